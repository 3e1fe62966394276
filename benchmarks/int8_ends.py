"""What int8 costs with and without the first convolution and the last matrix product, over several trainings.

python benchmarks/int8_ends.py [--seeds 3]
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from pathlib import Path
from unittest import mock

from export import parity, precision, publish
from export.engines import open_engine
from export.engines.ort import OrtEngine
from export.manifest import Manifest, Parity
from export.repository import Repository, Version
from training import loop, recipe

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
    print("seed  ends in fp32: disagreement, mean logit difference   ends in int8 too: the same")
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            fp32 = _trained(Path(folder) / str(seed), seed)
            kept = _int8(fp32, Path(folder) / "kept.onnx")
            with mock.patch.object(precision, "_ends", return_value=[]):
                every = _int8(fp32, Path(folder) / "every.onnx")
            print(f"{seed:4}  {_line(kept):>52}   {_line(every)}")
    print(
        f"504 test images of digits; {platform.processor() or platform.machine()}, Python {platform.python_version()}"
    )


def _trained(folder: Path, seed: int) -> Version:
    folder.mkdir()
    (folder / "recipe.toml").write_text(RECIPE.format(seed=seed))
    for _ in loop.train(recipe.read(folder / "recipe.toml"), out=folder / "run"):
        pass
    return publish.publish_checkpoint(folder / "run", repository=Repository(folder / "models"), name="digits")


def _int8(fp32: Version, path: Path) -> Parity:
    run = fp32.folder / "checkpoint"
    calibration = publish.images_for(run, None, split="train", count=publish.CALIBRATION_IMAGES)
    proof = publish.images_for(run, None, split="test", count=publish.PARITY_IMAGES)
    source = fp32.folder / fp32.manifest.file
    precision.int8_from_onnx(source, path, images=calibration.images, input_name=fp32.manifest.inputs[0].name)
    with open_engine(fp32.folder) as engine:
        expected = parity.batched(engine, proof.images, batch=64)
    with _engine(path, fp32.manifest) as engine:
        answers = parity.batched(engine, proof.images, batch=64)
    return parity.compare(answers, expected, reference="fp32", images="test", limits=parity.LIMITS["int8"])


def _engine(path: Path, manifest: Manifest) -> OrtEngine:
    return OrtEngine(path.parent, manifest.model_copy(update={"file": path.name}), device="cpu", threads=1)


def _line(result: Parity) -> str:
    assert result.agreement is not None
    return f"{1 - result.agreement:.2%}, {result.mean_abs_difference:.3f}"


if __name__ == "__main__":
    main()
