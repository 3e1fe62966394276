"""Images a second of engines, against plain ONNX Runtime and PyTorch in one run, and seconds to their first answer.

    python benchmarks/engines.py [--network resnet50] [--device cuda] [--batches 1 8 32 128] [--only first-answer]

random weights --tenet export--> fp32, fp16, int8 and, on a GPU, plans --> two tables:
    throughput     numpy array on the host -> array of logits on the host, contenders in turns
    first-answer   a fresh process: import the runtime, open the engine, answer one image

Plain ONNX Runtime is an InferenceSession of the same file on the same device, with as many threads, which do not spin
either, and no other option. Each round has a ratio of its own: what else the machine does meets all contenders alike.
PyTorch's rows are of the network that the engines were exported from. TensorFloat-32 is as each runtime has it by
default, which is off in our plans. What cannot run here is named, with the reason.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from benchmarks.hardware import hardware
from export.engines import open_engine, places, threads
from export.manifest import read

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

    from export.engines.base import Images, Logits
    from export.manifest import Manifest, Precision, Runtime, Target
    from export.repository import Repository, Version

    Answer = Callable[[Images], Logits]
    Engines = dict[str, tuple[Path, str | None]]  # by name: its folder and its provider

BATCHES = (1, 8, 32, 128)
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
PLANS: tuple[Runtime, ...] = ("tensorrt", "tensorrt_rtx")
PROVIDERS = ("cuda", "tensorrt", "nv_tensorrt_rtx")
SECTIONS = ("throughput", "first-answer")
TARGET = 0.98  # of plain ONNX Runtime's images a second

PLAIN = "plain ONNX Runtime"

# Photographs that int8 is calibrated on and that engines are proved on: their speed does not depend on them.
_PHOTOGRAPHS = 96

# Seconds that a contender goes on for, one call at least: long beside what its predecessor leaves behind, threads that
# spin and other weights in the caches, and short beside what else happens on the machine.
_TURN = 0.05

# A process that needs longer for its first answer hangs; plans of TensorRT are compiled in less.
_SECONDS = 300


class Architecture(NamedTuple):
    """A network to measure: who makes it, its images' side in pixels, its classes."""

    factory: str
    side: int
    classes: int


NETWORKS = {
    "resnet20": Architecture("benchmarks.engines:resnet20", 32, 10),
    "resnet50": Architecture("torchvision.models:resnet50", 224, 1000),
}


def resnet20(*, num_classes: int) -> nn.Module:
    """Return the residual network of 20 layers for small images."""
    from training import models, recipe  # noqa: PLC0415 - torch is not to be there in processes that time a start

    return models.ResNet(recipe.ResNet(), classes=num_classes)


@dataclass(frozen=True)
class Contender:
    """Something that answers images, once it is open.

    Attributes:
        name: for the reader.
        open: returns what answers; it is closed with the stack.
    """

    name: str
    open: Callable[[ExitStack], Answer]


def engine(folder: Path, *, device: str, provider: str | None, name: str) -> Contender:
    """Return one of our engines as a contender."""
    return Contender(name, lambda stack: stack.enter_context(open_engine(folder, device=device, provider=provider)))


def plain(folder: Path, *, device: str, defaults: bool = False) -> Contender:
    """Return an InferenceSession of an engine's file as a contender: with our options, or ONNX Runtime's own."""

    def opened(_: ExitStack) -> Answer:
        import onnxruntime  # noqa: PLC0415 - part of what the first answer takes

        options = onnxruntime.SessionOptions()
        if not defaults:
            options.intra_op_num_threads, options.inter_op_num_threads = threads.budget(), 1
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        ordinal = places.ordinal_of(device)
        wanted: list[tuple[str, dict[str, str]]] = [(places.NAMES["cpu"], {})]
        if ordinal is not None:
            onnxruntime.preload_dlls()
            wanted.insert(0, (places.NAMES["cuda"], {"device_id": str(ordinal)}))
        manifest = read(folder)
        session = onnxruntime.InferenceSession(str(folder / manifest.file), options, providers=wanted)
        if session.get_providers()[0] != wanted[0][0]:
            raise RuntimeError(f"expected {wanted[0][0]}, ONNX Runtime fell back to {session.get_providers()[0]}")
        feed, answer = manifest.inputs[0].name, manifest.outputs[0].name
        return lambda images: session.run([answer], {feed: images})[0]

    return Contender(f"{PLAIN}, its own options" if defaults else PLAIN, opened)


def pytorch(module: nn.Module, *, device: str, precision: str, compiled: bool) -> Contender:
    """Return the PyTorch network as a contender; "fp16" and "bf16" by autocast."""
    import torch  # noqa: PLC0415 - as in `resnet20`

    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    kept: Callable[[torch.Tensor], torch.Tensor] = module

    def opened(_: ExitStack) -> Answer:
        module.to(device)
        # Each batch size has code of its own, as it has a graph of its own in our plans.
        function = torch.compile(module, dynamic=False) if compiled else kept

        def answer(images: Images) -> Logits:
            with (
                torch.inference_mode(),
                torch.autocast(device.partition(":")[0], dtype=kind, enabled=kind != torch.float32),
            ):
                logits: Logits = function(torch.from_numpy(images).to(device)).float().cpu().numpy()
                return logits

        return answer

    return Contender(f"torch{'.compile' if compiled else ' eager'}, {precision}", opened)


def publish(
    repository: Repository, scratch: Path, architecture: Architecture, *, target: Target
) -> tuple[dict[str, Version], nn.Module]:
    """Publish a network with random weights in all precisions, int8 in the target's form; return them, and it."""
    import torch  # noqa: PLC0415 - as in `resnet20`

    from benchmarks.export_time import SHOWN_CLASSES, fit, photographs  # noqa: PLC0415 - it needs torch
    from export import twin  # noqa: PLC0415 - as above
    from export.publish import Form, Terms, publish_network  # noqa: PLC0415 - as above
    from export.variant import Variant, publish_variant  # noqa: PLC0415 - as above
    from training.models import imported  # noqa: PLC0415 - as above

    names = tuple(f"class{index}" for index in range(architecture.classes))
    images, weights, side = scratch / "photographs", scratch / "weights.pt", architecture.side
    photographs(images, names=names[:SHOWN_CLASSES], count=_PHOTOGRAPHS, side=side)
    torch.manual_seed(0)
    network = imported(architecture.factory)(num_classes=architecture.classes)
    assert isinstance(network, torch.nn.Module)
    fit(network, images, side=side)
    torch.save(network.state_dict(), weights)
    terms = Terms(images=images, count=_PHOTOGRAPHS)
    described = twin.Network(factory=architecture.factory, input_shape=(3, side, side), class_names=names)
    form = Form(max_batch=max(BATCHES))
    made = {"fp32": publish_network(described, weights, repository=repository, name="fp32", form=form, terms=terms)}
    for precision in PRECISIONS[1:]:
        variant = Variant(precision, target=target)
        made[precision] = publish_variant(
            made["fp32"], repository=repository, name=precision, variant=variant, terms=terms
        )
    return made, network.eval()


def plans(repository: Repository, source: Version, *, precision: Precision, images: Path) -> Iterator[tuple[str, Path]]:
    """Build the plans of a precision; yields runtimes and folders, and prints why one cannot be had."""
    from export.publish import Terms  # noqa: PLC0415 - as in `publish`
    from export.variant import Variant, publish_variant  # noqa: PLC0415 - as above

    for runtime in PLANS:
        name, variant = f"{precision}-{runtime}", Variant(precision, runtime=runtime)
        try:
            made = publish_variant(
                source,
                repository=repository,
                name=name,
                variant=variant,
                terms=Terms(images=images, count=_PHOTOGRAPHS),
            )
        except (RuntimeError, ValueError, OSError) as error:
            _skip(f"plan of {runtime}, {precision}", error)
        else:
            yield runtime, made.folder


def rounds(answers: dict[str, Answer], images: Images, *, seconds: float, number: int) -> dict[str, list[float]]:
    """Return each contender's images a second, once a round: they take short turns, every other time in reverse.

    Args:
        answers: what is measured, by name.
        images: the batch.
        seconds: of a round, for each of them.
        number: how many rounds, after one that warms up.
    """
    found: dict[str, list[float]] = {name: [] for name in answers}
    order = list(answers)
    for index in range(number + 1):
        taken: dict[str, list[float]] = {name: [] for name in answers}
        ends = time.perf_counter() + seconds * len(answers)
        while time.perf_counter() < ends:
            for name in order:
                taken[name] += _turn(answers[name], images)
            order.reverse()
        if index:
            for name, times in taken.items():
                found[name].append(len(images) / statistics.median(times))
    return found


def _turn(answer: Answer, images: Images) -> list[float]:
    """Return the seconds of each call in a turn."""
    times: list[float] = []
    while sum(times) < _TURN:
        began = time.perf_counter()
        answer(images)
        times.append(time.perf_counter() - began)
    return times


def first_answer() -> None:
    """Print the seconds of this process's first answer: NAME FOLDER DEVICE PROVIDER on its command line."""
    name, folder, device, provider = sys.argv[1:]
    path = Path(folder)
    image = np.zeros((1, *read(path).inputs[0].shape[1:]), dtype=np.float32)
    began = time.perf_counter()
    if name == PLAIN:
        contender = plain(path, device=device)
    else:
        contender = engine(path, device=device, provider=provider or None, name=name)
    with ExitStack() as stack:
        contender.open(stack)(image)
        print(time.perf_counter() - began)


def main() -> None:
    """Print the tables, and the hardware."""
    given = _arguments()
    from export.repository import Repository  # noqa: PLC0415 - not needed where a start is timed

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        repository = Repository(scratch / "models")
        architecture = NETWORKS[given.network]
        versions, network = publish(
            repository, scratch, architecture, target="cpu" if given.device == "cpu" else "tensorrt"
        )
        print(f"{given.network}, {architecture.side} x {architecture.side} pixels, device {given.device}")
        for precision in given.precisions:
            engines: Engines = {}
            for provider in ("cpu",) if given.device == "cpu" else PROVIDERS:
                engines[f"tenet, ONNX Runtime on {provider}"] = versions[precision].folder, provider
            if given.device != "cpu":
                made = plans(repository, versions["fp32"], precision=precision, images=scratch / "photographs")
                engines |= {f"tenet, plan of {runtime}": (where, None) for runtime, where in made}
            if "throughput" in given.only:
                _print_throughput(precision, versions[precision].folder, engines, network, given)
            if "first-answer" in given.only:
                _print_first_answers(precision, versions[precision].folder, engines, given)
    print(f"on {_device(given.device)}{hardware()}, {threads.budget()} threads")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="resnet20", help="what to measure")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="of the engines")
    parser.add_argument(
        "--batches", nargs="+", type=int, default=BATCHES, help=f"images a call, {max(BATCHES)} at most"
    )
    parser.add_argument("--rounds", type=int, default=10, help="measurements of each number")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each contender in a round")
    parser.add_argument("--starts", type=int, default=5, help="processes whose first answer is timed")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="tables to print")
    parser.add_argument("--defaults", action="store_true", help="a plain session with ONNX Runtime's own options, too")
    parser.add_argument("--torch", action="store_true", help="PyTorch on the CPU, too; on a GPU it always takes part")
    return parser.parse_args()


def _print_throughput(
    precision: str, folder: Path, engines: Engines, network: nn.Module, given: argparse.Namespace
) -> None:
    contenders = [plain(folder, device=given.device)]
    contenders += [
        engine(where, device=given.device, provider=provider, name=name) for name, (where, provider) in engines.items()
    ]
    contenders += [plain(folder, device=given.device, defaults=True)] if given.defaults else []
    if given.torch or given.device != "cpu":
        contenders += [
            pytorch(network, device=given.device, precision=kind, compiled=compiled)
            for kind in {"fp32": ("fp32",), "fp16": ("fp16", "bf16")}.get(precision, ())
            for compiled in (False, True)
        ]
    manifest = read(folder)
    print(f"\n{precision}, n = {given.rounds} rounds, median (lowest to highest)")
    print(f"{'batch':>5} {'':<34} {'images a second':>28} {'ratio to plain':>28}")
    with ExitStack() as stack:
        answers = dict(_opened(contenders, stack, manifest))
        for batch in given.batches:
            images = np.random.default_rng(0).random((batch, *manifest.image_shape), dtype=np.float32)
            found = rounds(answers, images, seconds=given.seconds, number=given.rounds)
            for name, rates in found.items():
                ratios = [rate / base for rate, base in zip(rates, found.get(PLAIN, rates), strict=True)]
                ratio = _words(ratios, ".3f") if PLAIN in found and name != PLAIN else ""
                print(f"{batch:>5} {name:<34} {_words(rates, '.0f'):>28} {ratio:>28}", flush=True)


def _opened(contenders: Sequence[Contender], stack: ExitStack, manifest: Manifest) -> Iterator[tuple[str, Answer]]:
    """Open what can be opened and answers; say why of the rest."""
    image = np.zeros((1, *manifest.image_shape), dtype=np.float32)
    for contender in contenders:
        try:
            answer = contender.open(stack)
            answer(image)
        except Exception as error:  # noqa: BLE001 - runtimes have no class of exceptions in common
            _skip(contender.name, error)
        else:
            yield contender.name, answer


def _print_first_answers(precision: str, folder: Path, engines: Engines, given: argparse.Namespace) -> None:
    print(f"\n{precision}, seconds until a fresh process has answered one image, n = {given.starts}")
    for name, (where, provider) in {PLAIN: (folder, None), **engines}.items():
        try:
            seconds = [_seconds(name, where, given.device, provider) for _ in range(given.starts + 1)]
        except RuntimeError as error:
            _skip(name, error)
        else:
            # The first one warms the disk's cache, and compiles what is kept for the next start.
            print(f"  {name:<34} {_words(seconds[1:], '.3f'):>28}; the very first {seconds[0]:.3f}", flush=True)


def _seconds(name: str, folder: Path, device: str, provider: str | None) -> float:
    start = [sys.executable, "-c", "from benchmarks.engines import first_answer; first_answer()"]
    done = subprocess.run(
        [*start, name, str(folder), device, provider or ""],
        capture_output=True, text=True, timeout=_SECONDS, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return float(done.stdout.split()[-1])


def _skip(name: str, error: Exception) -> None:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    print(f"  not measured: {name}: {reason}", flush=True)


def _words(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _device(device: str) -> str:
    if device == "cpu":
        return ""
    import torch  # noqa: PLC0415 - as in `resnet20`

    return f"{torch.cuda.get_device_name(device)}; PyTorch {torch.__version__}; "


if __name__ == "__main__":
    main()
