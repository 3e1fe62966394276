"""What AutoAttack's attacks find on a small network: the known answers that our attacks are held to.

    python benchmarks/attack_references.py --peers FOLDER [--train] [--seeds 3]

handwritten digits --adversarial training, with --train--> tests/golden/digits_network.npz: weights, 200 test images
network --torchattacks' APGD, APGD-T, FAB-T and Square, from each seed--> tests/golden/attacks.json

FOLDER holds torchattacks 3.5.1, a port of AutoAttack: `pip install --no-deps --target FOLDER torchattacks==3.5.1`.
A fault of the port: its APGD-T takes the step size of the whole batch from the first image, in the Euclidean norm, and
so may find less than AutoAttack does.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
IMAGES = 200  # of those that are not trained on
EPSILONS = {"linf": 0.2, "l2": 0.75}  # at which about half of the images hold
COMMAND = "python benchmarks/attack_references.py --peers FOLDER"
_HARDEST = 16  # the highest grey level of the digits
_TRAINED_AT = 0.12  # epsilon of the adversarial training, maximum norm


def network() -> nn.Sequential:
    """Return the network, not trained: (n, 1, 8, 8) in [0, 1] -> 10 logits."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits, shuffled: (1797, 1, 8, 8) in [0, 1], and their classes."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    images = torch.from_numpy(data.images[order] / _HARDEST).float()[:, None]
    return images, torch.from_numpy(data.target[order]).long()


def trained(images: Tensor, labels: Tensor, *, epochs: int = 40) -> nn.Sequential:
    """Train the network on perturbed images: 5 steps of PGD each."""
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for places in torch.split(torch.randperm(len(images)), 64):
            perturbed = _perturbed(model, images[places], labels[places])
            optimizer.zero_grad()
            functional.cross_entropy(model(perturbed), labels[places]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model.eval().requires_grad_(requires_grad=False)


def _perturbed(model: nn.Module, clean: Tensor, labels: Tensor) -> Tensor:
    images = (clean + _TRAINED_AT * (2 * torch.rand_like(clean) - 1)).clamp(0, 1)
    for _ in range(5):
        images.requires_grad_()
        (gradient,) = torch.autograd.grad(functional.cross_entropy(model(images), labels), images)
        moved = images.detach() + _TRAINED_AT / 3 * gradient.sign()
        images = moved.clamp(clean - _TRAINED_AT, clean + _TRAINED_AT).clamp(0, 1)
    return images


def save(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Write the network and the images that are attacked."""
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    levels = (images * _HARDEST).round().to(torch.uint8).numpy()
    np.savez_compressed(GOLDEN / "digits_network.npz", images=levels, labels=labels.numpy(), **weights)


def load() -> tuple[nn.Sequential, Tensor, Tensor]:
    """Return the committed network, and the images and classes that are attacked."""
    with np.load(GOLDEN / "digits_network.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    images, labels = arrays.pop("images").float() / _HARDEST, arrays.pop("labels")
    model = network()
    model.load_state_dict(arrays)
    return model.eval().requires_grad_(requires_grad=False), images, labels


def attacks(peer: Any, model: nn.Module, *, norm: str, seed: int) -> dict[str, Any]:
    """Return the attacks of AutoAttack's standard protocol, by our names."""
    common = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": EPSILONS[norm], "seed": seed, "n_restarts": 1}
    prefix = {"linf": "Linf", "l2": "L2"}[norm]
    return {
        f"{prefix}APGD": peer.APGD(model, steps=100, loss="ce", **common),
        f"{prefix}APGDT": peer.APGDT(model, steps=100, n_classes=10, **common),
        f"{prefix}FABT": peer.FAB(model, steps=100, multi_targeted=True, n_classes=10, **common),
        f"{prefix}Square": peer.Square(model, n_queries=5000, **common),
    }


def holds(model: nn.Module, attack: Callable[[Tensor, Tensor], Tensor], images: Tensor, labels: Tensor) -> list[int]:
    """Return which images are classified correctly after the attack, 0 or 1 each."""
    with torch.enable_grad():
        adversarial = attack(images, labels)
    return torch.eq(model(adversarial).argmax(1), labels).int().tolist()


def measured(peer: Any, *, seeds: int) -> dict[str, Any]:
    """Return the reference: robust images of each attack and seed."""
    model, images, labels = load()
    results: dict[str, Any] = {}
    for norm, epsilon in EPSILONS.items():
        for seed in range(seeds):
            for name, attack in attacks(peer, model, norm=norm, seed=seed).items():
                robust = holds(model, attack, images, labels)
                row = results.setdefault(name, {"epsilon": epsilon, "robust": [], "seed_0": ""})
                row["robust"].append(sum(robust))
                row["seed_0"] = row["seed_0"] or "".join(map(str, robust))
                print(f"{name}, seed {seed}: {sum(robust)} of {len(robust)}")
    clean = int(torch.eq(model(images).argmax(1), labels).sum())
    return {"command": COMMAND, "peer": "torchattacks 3.5.1", "images": len(images), "clean": clean, "attacks": results}


def main() -> None:
    """Train if asked to, and write the reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, metavar="FOLDER", help="where torchattacks is installed")
    parser.add_argument("--train", action="store_true", help="train the network anew")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each attack")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.train:
        images, labels = digits()
        save(trained(images[IMAGES:], labels[IMAGES:]), images[:IMAGES], labels[:IMAGES])
    sys.path.append(str(options.peers))
    reference = measured(importlib.import_module("torchattacks"), seeds=options.seeds)
    (GOLDEN / "attacks.json").write_text(json.dumps(reference, indent=1) + "\n")


if __name__ == "__main__":
    main()
