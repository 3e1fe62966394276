"""Requests a second and latency of `tenet serve` and of the field's other servers, in turns, in one run.

    python benchmarks/serving.py --peers FOLDER [--workload large] [--servers tenet,triton] [--rounds 3] [--seconds 3]

random weights --tenet export--> one ONNX file --> servers, all started at once --h2load--> a table a flight
                                               --> the engine alone, in batches of 32

Workloads: `small`, a ResNet-20 for 32 x 32 pixels, 12 KB a request; `large`, 224 x 224 pixels that are only pooled,
600 KB a request, so that carrying them is all there is to do. Requests have one image, every server two threads of
ONNX Runtime; 1, 8 or 32 requests are in flight, over one HTTP/2 connection to gRPC servers and over as many HTTP/1.1
connections to the others. h2load (Debian's nghttp2-client) sends them on the same cores: a client in Python takes as
much of them as a server, and hides it. Each round has a ratio of its own: what else the machine does meets all
servers alike. Every server is asked before and after for one answer, which must be the engine's own.

benchmarks/peers/install.sh FOLDER makes the environments of the others. What is not there is named and not measured.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import servers
from benchmarks.endpoints import MODEL
from benchmarks.hardware import hardware
from export.engines import open_engine
from export.repository import Repository

if TYPE_CHECKING:
    from torch import nn

    from benchmarks.endpoints import Endpoint, Speed
    from export.engines.base import Engine, Images, Logits

FLIGHTS = (1, 8, 32)
THREADS = 2
BATCH = 32  # images of one call of the engine alone
CLASSES = 10

# Answers may differ in their last digits: ONNX Runtime takes other paths for batches of other sizes.
_TOLERANCE = 1e-3
# Seconds that a round of the engine alone takes.
_ALONE_S = 2.0

_OF_SMALL = ["tenet", "tenet-native", "triton", "kserve", "mlserver", "litserve", "bentoml", "mosec"]
_OF_LARGE = ["tenet", "tenet-native", "tenet-shared-memory", "tenet-native-shared-memory", "triton"]


@dataclass(frozen=True)
class Workload:
    """What is served: who makes the network, its images' side in pixels, the servers to measure by default."""

    factory: str
    side: int
    servers: list[str]


WORKLOADS = {
    "small": Workload("benchmarks.engines:resnet20", 32, _OF_SMALL),
    "large": Workload("benchmarks.serving:pooled", 224, _OF_LARGE),
}


def pooled(*, num_classes: int) -> nn.Module:
    """Return the least of networks: the mean of each channel, and a linear layer."""
    from torch import nn  # noqa: PLC0415 - only for the export

    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))


def publish(workload: Workload, folder: Path) -> Path:
    """Export the network with random weights into a new repository; return the version's folder."""
    import torch  # noqa: PLC0415 - heavy, and only for the export
    from safetensors.torch import save_file  # noqa: PLC0415

    from export import twin  # noqa: PLC0415
    from export.publish import publish_network  # noqa: PLC0415

    torch.manual_seed(0)
    shape, names = (3, workload.side, workload.side), tuple(f"class{index}" for index in range(CLASSES))
    network = twin.Network(factory=workload.factory, input_shape=shape, class_names=names)
    weights, repository = folder / "weights.safetensors", Repository(folder / "models")
    module, _, function = workload.factory.partition(":")
    save_file(getattr(importlib.import_module(module), function)(num_classes=CLASSES).state_dict(), weights)
    return publish_network(network, weights, repository=repository, name=MODEL).folder


def check(name: str, endpoint: Endpoint, image: Images, expected: Logits) -> None:
    """Raise RuntimeError if a server's answer is not the engine's own."""
    answer = endpoint.ask(image)
    if answer.shape != (CLASSES,) or np.abs(answer - expected[0]).max() > _TOLERANCE:
        raise RuntimeError(f"{name}: expected the engine's answer {expected[0]}, got {answer}")


def alone(engine: Engine, image: Images) -> float:
    """Return images a second that the engine does in batches."""
    batch, count, began = np.repeat(image, BATCH, axis=0), 0, time.perf_counter()
    while time.perf_counter() < began + _ALONE_S:
        engine(batch)
        count += BATCH
    return count / (time.perf_counter() - began)


class Rounds:
    """What was measured, a value a round."""

    def __init__(self) -> None:
        self.alone: dict[int, list[float]] = defaultdict(list)
        self.speeds: dict[tuple[str, int], list[Speed]] = defaultdict(list)

    def add(self, engine: Engine, endpoints: dict[str, Endpoint], image: Images, *, seconds: int) -> None:
        """Measure a round: at each flight the engine alone, then each server in its turn."""
        for flight in FLIGHTS:
            self.alone[flight].append(alone(engine, image))
            for name, endpoint in endpoints.items():
                self.speeds[name, flight].append(endpoint.load(image, flight=flight, seconds=seconds))

    def print(self, names: list[str]) -> None:
        """Print a table a flight; ratios are of the first server's rate to each other's, and to the engine alone."""
        for flight in FLIGHTS:
            print(f"\n{flight} in flight, n = {len(self.alone[flight])} rounds, median (lowest to highest)")
            print(f"{'':28}{'requests a second':>26}{'p99, ms':>25}{f'{names[0]} to it':>22}{'to the engine':>15}")
            for name in names:
                print(self._row(name, names[0], flight))
            print(f"{f'the engine, batches of {BATCH}':28}{_spread(self.alone[flight]):>26}")

    def _row(self, name: str, first: str, flight: int) -> str:
        speeds = self.speeds[name, flight]
        rates = [speed.rate for speed in speeds]
        ratios = [ours.rate / rate for ours, rate in zip(self.speeds[first, flight], rates, strict=True)]
        engine = statistics.median(rate / alone for rate, alone in zip(rates, self.alone[flight], strict=True))
        p99 = _spread([speed.p99 for speed in speeds], digits=1)
        return f"{name:28}{_spread(rates):>26}{p99:>25}{_spread(ratios, digits=2):>22}{engine:>15.2f}"


def _spread(values: list[float], *, digits: int = 0) -> str:
    median, low, high = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{median} ({low} to {high})"


def measure(workload: Workload, names: list[str], *, peers: Path, rounds: int, seconds: int) -> None:
    """Start the servers, measure them in turns, and print the tables."""
    measured = Rounds()
    with tempfile.TemporaryDirectory() as made, ExitStack() as running:
        folder = Path(made)
        version = publish(workload, folder)
        shape = (1, 3, workload.side, workload.side)
        image = np.random.default_rng(0).random(shape, dtype=np.float32)
        subject = servers.Subject(folder / "models", version / "model.onnx", image, THREADS)
        engine = running.enter_context(open_engine(version, threads=THREADS))
        endpoints = {}
        for name in names:
            try:
                endpoints[name] = running.enter_context(servers.started(name, subject, peers=peers, folder=folder))
            except (FileNotFoundError, RuntimeError) as error:
                print(f"not measured: {error}")
        for turn in range(rounds + 1):
            for name, endpoint in endpoints.items():
                check(name, endpoint, image, engine(image))
            if turn < rounds:
                measured.add(engine, endpoints, image, seconds=seconds)
        measured.print(list(endpoints))


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=Path("peers"), help="the folder of the peers' environments")
    parser.add_argument("--workload", choices=WORKLOADS, default="small")
    parser.add_argument("--servers", help=f"some of {', '.join([*servers.OURS, *servers.PEERS])}, with commas between")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3, help="of load for each server, flight and round")
    options = parser.parse_args()
    workload = WORKLOADS[options.workload]
    names = options.servers.split(",") if options.servers else workload.servers
    if unknown := set(names) - {*servers.OURS, *servers.PEERS}:
        parser.error(f"--servers: expected names of --help, got {', '.join(sorted(unknown))}")
    print(f"{options.workload}: {workload.factory}, {workload.side} x {workload.side} pixels, {THREADS} threads")
    measure(workload, names, peers=options.peers, rounds=options.rounds, seconds=options.seconds)
    print(f"on {hardware()}")


if __name__ == "__main__":
    main()
