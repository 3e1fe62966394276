"""What TENET changes: clean error and robust accuracy under PGD, with and without it, over several seeds.

    python benchmarks/tenet_evidence.py --folder cifar10 --out evidence              # a CPU: a small ResNet on a subset
    python benchmarks/tenet_evidence.py --folder cifar10 --out evidence --size full --device cuda

FOLDER holds train/CLASS/*.jpg and test/CLASS/*.jpg. Every run lies in OUT/SIZE/runs and every measurement in
OUT/SIZE/measured: started again, the script goes on where it stopped, and several may work on seeds of their own.

A TENET step is an optimiser step of its own, so a baseline stands twice: at equal epochs, and longer, at equal
steps. Attacks are PGD from a random start on the best epoch's weights, on some images of the test set in a seeded
order; an image that is classified wrongly to begin with counts as not robust.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.hardware import hardware
from training import adversarial, augment, checkpoint, datasets, loop, recipe
from training.events import EpochEnded, TrainingEnded
from training.recipe import PgdAdversarial
from training.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from training.data import LabelledImages

INTERVAL = 3  # iterations to a TENET step, as published
STEPS = 20  # of PGD, each an eighth of epsilon
EVALUATION_BATCH = 250  # images


Record = dict[str, Any]
Measure = Callable[[Record], float]


@dataclass(frozen=True)
class Size:
    """How much is trained: what the hardware allows."""

    model: dict[str, Any]
    stage: str
    epochs: int
    per_class: int | None
    batch_size: int
    tenet_start: int  # iterations; the published 500 are a small part of a full run, and most of a small one
    attacked: int  # images
    precision: str


SIZES = {
    "small": Size({"name": "resnet", "depth": 8, "width": 16}, "layer2", 12, 500, 64, 100, 1000, precision="fp32"),
    "full": Size({"name": "resnext"}, "stage_2", 100, None, 128, 500, 5000, precision="bf16"),
}


@dataclass(frozen=True)
class Regime:
    """A way to train. `longer` says that a baseline takes as many optimiser steps as its twin with TENET."""

    name: str
    baseline: str
    augmix: bool = False
    free: bool = False
    tenet: dict[str, Any] | None = None
    longer: bool = False


REGIMES = (
    Regime("plain", "plain"),
    Regime("plain, equal steps", "plain", longer=True),
    Regime("TENET paper", "plain", tenet={"variant": "paper"}),
    Regime("TENET published", "plain", tenet={"variant": "published"}),
    Regime("TENET published, fused", "plain", tenet={"variant": "published", "fused": True}),
    Regime("TENET published, exact", "plain", tenet={"variant": "published", "exact": True}),
    Regime("TENET paper, exact", "plain", tenet={"variant": "paper", "exact": True}),
    Regime("AugMix", "AugMix", augmix=True),
    Regime("AugMix, equal steps", "AugMix", augmix=True, longer=True),
    Regime("AugMix + TENET", "AugMix", augmix=True, tenet={"variant": "published"}),
    Regime("free AT", "free AT", free=True),
    Regime("free AT, equal steps", "free AT", free=True, longer=True),
    Regime("free AT + TENET", "free AT", free=True, tenet={"variant": "published"}),
)
REPLAYS = 4  # of free adversarial training
NATURAL_EPSILONS = (0.5, 1.0, 2.0)  # of 255, for classifiers trained on natural images
ROBUST_EPSILONS = (2.0, 4.0, 8.0)  # of 255, for adversarial training
TRAINED_EPSILON = "8/255"


def document(regime: Regime, size: Size, *, folder: Path, seed: int) -> dict[str, Any]:
    """Return the recipe of a regime."""
    epochs = size.epochs * (INTERVAL + 1) // INTERVAL if regime.longer else size.epochs
    described: dict[str, Any] = {
        "data": {"name": "folder", "root": str(folder), "validation": 0.1, "per_class": size.per_class},
        "model": size.model | {"mean": [0.491, 0.482, 0.447], "std": [0.247, 0.243, 0.262]},
        "training": {
            "epochs": max(1, round(epochs / REPLAYS)) if regime.free else epochs,
            "batch_size": size.batch_size,
            "schedule": "one-cycle",
            "precision": size.precision,
            "channels_last": True,
            "seed": seed,
            "threads": 1,
        },
        "augmentation": {"crop_padding": 4, "flip": True},
    }
    if regime.augmix:
        described["augmentation"]["augmix"] = {"jsd": 12.0}
    if regime.free:
        described["adversarial"] = {"method": "free", "epsilon": TRAINED_EPSILON, "replays": REPLAYS}
    if regime.tenet is not None:
        described["tenet"] = {"stage": size.stage, "interval": INTERVAL, "start": size.tenet_start} | regime.tenet
    return described


def trained(regime: Regime, size: Size, *, folder: Path, seed: int, out: Path, device: str) -> Path:
    """Train, or go on with what was interrupted; return the RUN folder."""
    run = out / "runs" / f"{_slug(regime.name)}-{seed}"
    settings = recipe.decode(document(regime, size, folder=folder, seed=seed), source=regime.name)
    if run.exists():
        if checkpoint.record(run).recipe != settings:
            raise ValueError(f"{run}: expected the recipe of {regime.name}, got a run of another; name another --out")
        return run
    interrupted = (checkpoint.partial_path(run) / checkpoint.STATE).exists()
    for event in loop.train(settings, out=run, device=device, resume=interrupted):
        if isinstance(event, EpochEnded | TrainingEnded):
            print(f"{regime.name}, seed {seed}: {event}", flush=True)
    return run


def measured(regime: Regime, run: Path, size: Size, *, test: LabelledImages, out: Path, device: str) -> None:
    """Measure a run and write the numbers, unless that has been done."""
    path = out / "measured" / f"{run.name}.json"
    if path.exists():
        return
    loaded = checkpoint.load(run)
    model = loaded.model.to(device).requires_grad_(requires_grad=False)
    images, labels = augment.unit_range(torch.from_numpy(test.images)), torch.from_numpy(test.labels)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels))[: size.attacked])
    clean = _errors(model, images, labels, device=device)
    record = {
        "regime": regime.name,
        "seed": loaded.recipe.training.seed,
        "clean_error": float(clean.mean()),
        "images": len(labels),
        "attacked": len(order),
        "robust_accuracy": {
            f"{epsilon:g}/255": 1
            - float(_attacked_errors(model, images[order], labels[order], epsilon / 255, device=device).mean())
            for epsilon in (ROBUST_EPSILONS if regime.free else NATURAL_EPSILONS)
        },
        "iterations": loaded.metrics["iterations"],
        "tenet_steps": loaded.metrics["tenet_steps"],
        "seconds": loaded.metrics["seconds"],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record, indent=2) + "\n")
    unfinished.rename(path)


def _errors(model: nn.Module, images: Tensor, labels: Tensor, *, device: str) -> Tensor:
    with torch.inference_mode():
        wrong = [
            model(x.to(device)).argmax(1).cpu() != y
            for x, y in zip(torch.split(images, EVALUATION_BATCH), torch.split(labels, EVALUATION_BATCH), strict=True)
        ]
    return torch.cat(wrong).float()


def _attacked_errors(model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, *, device: str) -> Tensor:
    attack = PgdAdversarial(method="pgd", epsilon=epsilon, steps=STEPS, step_size=epsilon / 8, random_start=True)
    stream = Stream(torch.Generator().manual_seed(0))
    attacked = [
        adversarial.pgd(x.to(device), y.to(device), model=model, settings=attack, stream=stream).cpu()
        for x, y in zip(torch.split(images, EVALUATION_BATCH), torch.split(labels, EVALUATION_BATCH), strict=True)
    ]
    wrong = _errors(model, images, labels, device=device)  # what is wrong without an attack stays wrong
    return torch.maximum(wrong, _errors(model, torch.cat(attacked), labels, device=device))


def tables(out: Path, size: Size) -> str:
    """Return the tables of all that has been measured, in Markdown."""
    records = [json.loads(path.read_text()) for path in sorted((out / "measured").glob("*.json"))]
    parts = [
        f"Model {size.model}, {', '.join(f'{key} {value}' for key, value in asdict(size).items() if key != 'model')}; "
        f"all in %, mean ± standard deviation over n seeds; {hardware()}; commit {_commit()}",
    ]
    for title, epsilons, free in (
        ("Natural training", NATURAL_EPSILONS, False),
        (f"Free adversarial training, {TRAINED_EPSILON}, {REPLAYS} replays", ROBUST_EPSILONS, True),
    ):
        regimes = [regime for regime in REGIMES if regime.free == free]
        measures = {"clean error": _clean_error} | {
            f"robust accuracy, {epsilon:g}/255": _robust_accuracy(f"{epsilon:g}/255") for epsilon in epsilons
        }
        parts += [f"### {title}", _absolute(records, regimes, measures), _paired(records, regimes, measures)]
    return "\n\n".join(part for part in parts if part)


def _absolute(records: list[Record], regimes: Sequence[Regime], measures: dict[str, Measure]) -> str:
    rows = [["regime", "n", "optimiser steps", *measures], ["---"] * (3 + len(measures))]
    for regime in regimes:
        own = list(_by_seed(records, regime.name).values())
        if own:
            fused = regime.tenet is not None and regime.tenet.get("fused", False)
            steps = statistics.mean(record["iterations"] + (0 if fused else record["tenet_steps"]) for record in own)
            errors = [_spread([measure(record) for record in own]) for measure in measures.values()]
            rows.append([regime.name, str(len(own)), f"{steps:.0f}", *errors])
    return _table(rows)


def _paired(records: list[Record], regimes: Sequence[Regime], measures: dict[str, Measure]) -> str:
    """Return the differences between runs of one seed with TENET and without."""
    rows = [["difference", "n", *measures], ["---"] * (2 + len(measures))]
    for regime in regimes:
        for baseline in (regime.baseline, f"{regime.baseline}, equal steps"):
            own, base = _by_seed(records, regime.name), _by_seed(records, baseline)
            seeds = sorted(own.keys() & base.keys())
            if regime.tenet is None or not seeds:
                continue
            differences = [
                _spread([measure(own[seed]) - measure(base[seed]) for seed in seeds], signed=True)
                for measure in measures.values()
            ]
            rows.append([f"{regime.name} - {baseline}", str(len(seeds)), *differences])
    return _table(rows)


def _clean_error(record: Record) -> float:
    return float(100 * record["clean_error"])


def _robust_accuracy(epsilon: str) -> Measure:
    return lambda record: float(100 * record["robust_accuracy"][epsilon])


def _by_seed(records: list[Record], regime: str) -> dict[int, Record]:
    return {record["seed"]: record for record in records if record["regime"] == regime}


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows) if len(rows) > 2 else ""


def _spread(values: Sequence[float], *, signed: bool = False) -> str:
    """Return the mean and, of more than one, the standard deviation."""
    mean = f"{statistics.mean(values):{'+' if signed else ''}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _slug(name: str) -> str:
    return name.lower().replace(" + ", "-").replace(", ", "-").replace(" ", "-")


def main() -> None:
    """Train and measure every regime and seed that is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="the image folder with train/ and test/ in it")
    parser.add_argument("--out", type=Path, required=True, help="where runs and measurements are kept")
    parser.add_argument("--size", choices=SIZES, default="small", help="small for a CPU, full for a GPU")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--regimes", nargs="+", default=[regime.name for regime in REGIMES], metavar="NAME")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    size, out = SIZES[options.size], options.out / options.size
    test = datasets.load("folder", split="test", root=options.folder)
    for seed in options.seeds:
        for regime in REGIMES:
            if regime.name not in options.regimes:
                continue
            run = trained(regime, size, folder=options.folder, seed=seed, out=out, device=options.device)
            measured(regime, run, size, test=test, out=out, device=options.device)
    print(tables(out, size))


if __name__ == "__main__":
    main()
