"""Seconds of `tenet export` from a ResNet-50's weights to fp32, int8 and a TensorRT plan; the aim is 60 on two cores.

    python benchmarks/export_time.py [--phases] [--images 300] [--runs 3] [--folder PHOTOGRAPHS] [-- --parity-images 64]

random weights, photographs --tenet export--> resnet50 --from--> resnet50-int8, resnet50-plan

The commands are real ones, each a process of its own, imports included. The network has random weights, the running
statistics of the photographs and, for a last layer, the mean features of their classes: it answers with margins, as a
trained one does, so that the proof of int8 is no matter of ties. Without --folder the photographs are made up: fields
with the amplitudes of natural images, 1/f, around a colour of their class. Nothing of that takes part in the seconds.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks.hardware import hardware
from export.engines import threads
from training import augment, data

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

FACTORY = "torchvision.models:resnet50"
SIDE = 224  # pixels
CLASSES = 1000  # of the network, as ImageNet's
SHOWN_CLASSES = 8  # of the photographs: one for each corner of the cube of colours
TARGET = 60  # seconds, of all commands together, on two cores

# Photographs that the network is fitted to: enough for statistics, and seconds of work.
_FITTED = 64
_BATCH = 16

# The weight of a residual branch beside its shortcut: with 1, random layers multiply every rounding.
_BRANCH = 0.3

# What the logits of a class are made to stand out by, on average: as those of trained networks do.
_MARGIN = 10.0

# What is measured apart, and what it is called; what is called inside another is not counted there.
_PHASES: dict[str, str | Callable[..., str]] = {
    "export.publish:proof_images": "reading photographs",
    "export.variant:_calibration_images": "reading photographs",
    "export.twin:write": "loading and keeping the weights",
    "export.onnx_graph:onnx_from_module": "exporter, and checks of its graph",
    "export.reference:batched": "answers of PyTorch",
    "export.publish:open_engine": "opening engines",
    "export.reference:open_engine": "opening engines",
    "export.engines.base:Engine.classify": lambda engine, *_: f"answers of {engine.manifest.model}",
    "export.graph.preparation:prepare": "preparing the graph for int8",
    "export.rounding.calibration:ranges": "calibration",
    "export.rounding.int8:Quantiser.graph": "quantising",
    "export.tensorrt_plan:plan_from_onnx": "building the plan",
    "export.manifest:sha256_of": "checksums",
}


class Spent(NamedTuple):
    """What a command took: seconds on the wall, and those of all processors together."""

    seconds: float
    processor: float


def photographs(folder: Path, *, names: Sequence[str], count: int, side: int = SIDE) -> None:
    """Write made-up photographs, JPEG files, in a folder for each class."""
    generator = np.random.default_rng(0)
    frequencies = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    frequencies[0, 0] = np.inf  # the mean is the colour's
    corners = np.array(list(itertools.product((-1, 1), repeat=3)))[..., None, None]
    for index in range(count):
        kind = index % len(names)
        spectrum = generator.standard_normal((2, 4, *frequencies.shape)) / frequencies
        fields = np.fft.irfft2(spectrum[0] + 1j * spectrum[1], s=(side, side))
        light, *tints = fields / fields.std(axis=(1, 2), keepdims=True)
        pixels = 128 + 50 * corners[kind] + 40 * light + 12 * np.stack(tints)
        path = folder / names[kind] / f"{index:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(path, quality=90)


def fit(network: nn.Module, folder: Path, *, side: int = SIDE) -> None:
    """Give a network of random weights the statistics of photographs, and a last layer that tells their classes."""
    stored = data.from_folder(folder)
    read = stored.subset(np.random.default_rng(0).permutation(len(stored))[:_FITTED]).read(side)
    images, labels = augment.unit_range(torch.from_numpy(read.images)), torch.from_numpy(read.labels)
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the mean of all batches
            if isinstance(branch := getattr(module, "bn3", getattr(module, "bn2", None)), nn.BatchNorm2d):
                branch.weight.fill_(_BRANCH)
        _features(network.train(), last, images)
        features = _features(network.eval(), last, images)
        last.weight.mul_(0.01)
        last.bias.fill_(-_MARGIN)
        centre = features.mean(0)
        for label in sorted(set(labels.tolist())):
            direction = features[labels == label].mean(0) - centre
            last.weight[label] = 2 * _MARGIN * direction / direction.square().sum()
            last.bias[label] = -last.weight[label] @ (centre + direction / 2)


def _features(network: nn.Module, last: nn.Linear, images: Tensor) -> Tensor:
    """Return what a network's last layer takes."""
    seen: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for start in range(0, len(images), _BATCH):
        network(images[start : start + _BATCH])
    hook.remove()
    return torch.cat(seen)


def commands(folder: Path, *, images: Path, more: Sequence[str] = ()) -> dict[str, list[str]]:
    """Return the arguments of `tenet` that make each engine of what lies in a folder, `more` among them."""

    def export(name: str, *flags: str | Path) -> list[str]:
        place = ["--repository", folder / "models", "--name", name, "--images", images]
        return ["export", *map(str, (*flags, *place)), *more]

    network = ("--factory", FACTORY, "--weights", folder / "weights.pt", "--labels", folder / "labels.txt")
    return {
        "fp32": export("resnet50", *network, "--input-shape", f"3,{SIDE},{SIDE}"),
        "int8": export("resnet50-int8", "--from", "resnet50", "--precision", "int8"),
        "plan": export("resnet50-plan", "--from", "resnet50", "--runtime", "tensorrt_rtx"),
    }


def _prepare(folder: Path, given: argparse.Namespace) -> Path:
    """Write weights and labels into a folder; return the photographs'."""
    images: Path = given.folder or folder / "photographs"
    names = [f"class{index}" for index in range(SHOWN_CLASSES)]
    if given.folder is None:
        photographs(images, names=names, count=given.images)
    else:
        names = list(data.from_folder(images).class_names)
    names += [f"other{index}" for index in range(CLASSES - len(names))]
    (folder / "labels.txt").write_text("\n".join(names) + "\n")
    torch.manual_seed(0)
    module, _, function = FACTORY.partition(":")
    network = getattr(importlib.import_module(module), function)(num_classes=CLASSES)
    fit(network, images)
    torch.save(network.state_dict(), folder / "weights.pt")
    return images


def _run(arguments: list[str], *, phases: bool, quiet: bool) -> Spent:
    start = ["-c", "from benchmarks.export_time import timed_command; timed_command()"] if phases else ["-m", "service"]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *start, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode or not quiet:
        print(done.stdout)
    if done.returncode:
        raise SystemExit(f"tenet {' '.join(arguments)}: exit code {done.returncode}")
    return Spent(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def timed_command() -> None:
    """Run the command line of this process, and print what its seconds went to on stderr: most first."""
    began, clock = time.perf_counter(), _Clock()
    with clock.running("imports"):
        for name in ("service.__main__", "torchvision.models", *(place.partition(":")[0] for place in _PHASES)):
            importlib.import_module(name)
        app = importlib.import_module("service.__main__").app
    for place, label in _PHASES.items():
        clock.watch(place, label)
    code = app(standalone_mode=False)
    rest = time.perf_counter() - began - sum(clock.seconds.values())
    for label, seconds in sorted({**clock.seconds, "everything else": rest}.items(), key=lambda item: -item[1]):
        print(f"    {seconds:6.2f} s  {label}", file=sys.stderr)
    sys.exit(code)


class _Clock:
    """Seconds by label; a clock that runs inside another stops it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    @contextmanager
    def running(self, label: str) -> Iterator[None]:
        began = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            taken = time.perf_counter() - began
            self.seconds[label] += taken - self._inner.pop()
            self._inner[-1] += taken

    def watch(self, place: str, label: str | Callable[..., str]) -> None:
        """Count the calls of "module:function" or "module:Class.method"."""
        module, _, path = place.partition(":")
        *owners, name = path.split(".")
        owner: Any = importlib.import_module(module)
        for attribute in owners:
            owner = getattr(owner, attribute)
        function = getattr(owner, name)

        @wraps(function)
        def counted(*arguments: Any, **keywords: Any) -> Any:
            with self.running(label(*arguments) if callable(label) else label):
                return function(*arguments, **keywords)

        setattr(owner, name, counted)


def main() -> None:
    """Print the seconds of each command and of all, and the hardware."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1, help="times that everything is exported anew")
    parser.add_argument("--images", type=int, default=300, help="made-up photographs")
    parser.add_argument("--folder", type=Path, help="class folders of photographs of your own instead")
    parser.add_argument("--phases", action="store_true", help="print what the seconds of each command go to")
    parser.add_argument("--only", nargs="+", choices=("fp32", "int8", "plan"), help="these engines; fp32 comes first")
    parser.add_argument("--verbose", action="store_true", help="print what the commands print")
    parser.add_argument("more", nargs="*", help="further flags of each command, after --")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        images = _prepare(folder, given)
        runs = [_once(folder, images, given) for _ in range(given.runs)]
    print(f"tenet export of ResNet-50, {SIDE} x {SIDE}, n = {given.runs}: seconds, median (lowest to highest)")
    for name in runs[0]:
        _print_row(name, [run[name] for run in runs])
    sums = [Spent(*map(sum, zip(*run.values(), strict=True))) for run in runs]
    _print_row("all", sums)
    print(f"on {hardware()}, {threads.budget()} threads; the aim for all is {TARGET} s on two cores")


def _once(folder: Path, images: Path, given: argparse.Namespace) -> dict[str, Spent]:
    shutil.rmtree(folder / "models", ignore_errors=True)
    spent = {}
    for name, arguments in commands(folder, images=images, more=given.more).items():
        if given.only is None or name in given.only or name == "fp32":
            if given.phases:
                print(f"  {name}", file=sys.stderr)
            spent[name] = _run(arguments, phases=given.phases, quiet=not given.verbose)
    return spent


def _print_row(name: str, spent: list[Spent]) -> None:
    wall, processor = ([f"{value:.1f}" for value in _spread(column)] for column in zip(*spent, strict=True))
    print(
        f"  {name:<5} {f'{wall[1]} ({wall[0]} to {wall[2]})':>22} on the wall, "
        f"{f'{processor[1]} ({processor[0]} to {processor[2]})':>24} of the processors"
    )


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return min(values), statistics.median(values), max(values)


if __name__ == "__main__":
    main()
