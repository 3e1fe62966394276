"""What int8 costs with and without the first convolution and the last matrix product, over several trainings.

python benchmarks/int8_ends.py [--seeds 3]
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export import images, publish, sensitivity, variant
from export.repository import Repository
from export.rounding import int8
from training import loop, recipe

if TYPE_CHECKING:
    from export.images import ImageSet
    from export.rounding.int8 import Quantiser

# Images that disagreement is measured on, at most.
PROOF_IMAGES = 512

RECIPE = """
[data]
name = "digits"
[model]
depth = 8
width = 8
[training]
epochs = 6
batch_size = 32
learning_rate = 0.1
threads = 1
seed = {seed}
[tenet]
stage = "layer2"
start = 40
"""


def main() -> None:
    """Train, quantise both ways and print how often top-1 differs from fp32, and by how much the logits do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="how many trainings")
    seeds = parser.parse_args().seeds
    print("seed  target     ends in fp32: disagreement, mean logit difference   ends in int8 too: the same")
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            run, source = _trained(Path(folder) / str(seed), seed)
            calibration, proof = (_images(run, split) for split in ("train", "test"))
            for target in ("cpu", "tensorrt"):
                kept = int8.quantiser(source, inputs=calibration.images, target=target)
                layers = kept.prepared.layers
                every = replace(kept, ends=kept.ends - {layers[0].name, layers[-1].name})
                print(f"{seed:4}  {target:8} {_line(kept, proof):>52}   {_line(every, proof)}")
    print(
        f"{len(proof)} {proof.description}; {platform.processor() or platform.machine()}, "
        f"Python {platform.python_version()}"
    )


def _trained(folder: Path, seed: int) -> tuple[Path, Path]:
    """Return a run and its ONNX file."""
    folder.mkdir()
    (folder / "recipe.toml").write_text(RECIPE.format(seed=seed))
    for _ in loop.train(recipe.read(folder / "recipe.toml"), out=folder / "run"):
        pass
    fp32 = publish.publish_checkpoint(folder / "run", repository=Repository(folder / "models"), name="digits")
    return folder / "run", fp32.folder / fp32.manifest.file


def _images(run: Path, split: str) -> ImageSet:
    count = variant.CALIBRATION_IMAGES if split == "train" else PROOF_IMAGES
    return images.from_run(run, split=split, count=count, class_names=tuple("0123456789"))


def _line(quantiser: Quantiser, proof: ImageSet) -> str:
    expected = sensitivity.answers(quantiser.prepared.model, proof.images)
    answers = sensitivity.answers(quantiser.graph(), proof.images)
    disagreement = sensitivity.disagreement(answers, expected)
    return f"{disagreement:.2%}, {np.abs(answers - expected).mean():.3f}"


if __name__ == "__main__":
    main()
