"""The servers that are compared: `tenet serve` under several settings, and the peers of benchmarks/peers.

name --start--> a process --await an answer--> Endpoint
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, replace
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import grpc
import numpy as np

from benchmarks import startup
from benchmarks.endpoints import Endpoint
from protos.inference import open_inference_pb2 as pb
from protos.inference.open_inference_pb2_grpc import GRPCInferenceServiceStub

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.endpoints import Wire
    from export.engines.base import Images

_PEERS = Path(__file__).parent / "peers"

# Seconds that a server may take to answer: Triton's Python backend, the slowest here, takes 10.
_PATIENCE_S = 90
# Seconds that a peer may take to end; Triton leaves shared memory behind if it is not let.
_END_S = 30

_REGION = "image"


@dataclass(frozen=True)
class Subject:
    """What all servers of a run serve.

    Attributes:
        repository: the model repository.
        model: its ONNX file.
        image: one image, batch and all.
    """

    repository: Path
    model: Path
    image: Images
    threads: int


class Peer(NamedTuple):
    """Another server: its script, the environment that has it, how it is asked."""

    script: str
    environment: str
    wire: Wire = "grpc"
    path: str = Endpoint.path


# Lines of settings beside the threads.
OURS = {
    "tenet": "",
    "tenet-native": '[server]\nfront = "native"\n',
    "tenet-shared-memory": "[shared_memory]\nenabled = true\n",
    "tenet-native-shared-memory": '[server]\nfront = "native"\n[shared_memory]\nenabled = true\n',
}

PEERS = {
    "triton": Peer("pytriton_server.py", "nvidia-pytriton"),
    "kserve": Peer("kserve_server.py", "kserve"),
    "mlserver": Peer("mlserver_server.py", "mlserver"),
    "litserve": Peer("litserve_server.py", "litserve", "json", "/predict"),
    "bentoml": Peer("bentoml_server.py", "bentoml", "json", "/classify"),
    "mosec": Peer("mosec_server.py", "mosec", "bytes", "/inference"),
}


@contextlib.contextmanager
def started(name: str, subject: Subject, *, peers: Path, folder: Path) -> Iterator[Endpoint]:
    """Start a server, and yield where it answers; end it with the block.

    Args:
        name: one of `OURS` or `PEERS`.
        subject: what it serves.
        peers: the folder of the peers' environments.
        folder: for settings and logs.

    Raises:
        FileNotFoundError: the environment of the peer is not there.
        RuntimeError: the server ended, or did not answer in time.
    """
    start = _ours(name, subject, folder) if name in OURS else _peer(name, subject, peers, folder)
    with start as endpoint, contextlib.ExitStack() as memory:
        if name.endswith("shared-memory"):
            memory.enter_context(_registered(endpoint, subject.image))
            yield replace(endpoint, region=_REGION)
        else:
            yield endpoint


@contextlib.contextmanager
def _ours(name: str, subject: Subject, folder: Path) -> Iterator[Endpoint]:
    settings = folder / f"{name}.toml"
    settings.write_text(f'{OURS[name]}[engine]\nthreads = {subject.threads}\n[logging]\nlevel = "warning"\n')
    with startup.server(subject.repository, settings=settings) as address:
        yield Endpoint(int(address.rpartition(":")[2]))


@contextlib.contextmanager
def _peer(name: str, subject: Subject, peers: Path, folder: Path) -> Iterator[Endpoint]:
    peer = PEERS[name]
    python = peers / peer.environment / "bin" / "python"
    if not python.is_file():
        raise FileNotFoundError(f"{python}: expected {name}'s environment; make it with benchmarks/peers/install.sh")
    endpoint = Endpoint(_free_port(), peer.wire, peer.path)
    shape = ",".join(map(str, subject.image.shape[1:]))
    arguments = [str(subject.model), str(endpoint.port), str(subject.threads), shape]
    log = folder / f"{name}.log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            [python, _PEERS / peer.script, *arguments], stdout=output, stderr=output, start_new_session=True
        ) as process,
    ):
        try:
            _await_answer(endpoint, subject.image, process, log)
            yield endpoint
        finally:
            _end(process)


def _await_answer(endpoint: Endpoint, image: Images, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _PATIENCE_S
    while True:
        try:
            endpoint.ask(image)
        except (OSError, grpc.RpcError) as error:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{log.stem} does not answer: {error}; {log.read_text()[-600:]}") from None
            time.sleep(0.2)
        else:
            return


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a peer and the processes that it has started."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
        os.killpg(process.pid, signal.SIGKILL)


def _free_port() -> int:
    """Return a port that is free; the two after it, which some peers take too, are likely to be."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextlib.contextmanager
def _registered(endpoint: Endpoint, image: Images) -> Iterator[None]:
    """Put the image into shared memory that the server knows as a region."""
    memory = SharedMemory(create=True, size=image.nbytes)
    try:
        np.ndarray(image.shape, image.dtype, memory.buf)[:] = image
        with grpc.insecure_channel(f"127.0.0.1:{endpoint.port}") as channel:
            request = pb.SystemSharedMemoryRegisterRequest(name=_REGION, key=memory.name, byte_size=image.nbytes)
            GRPCInferenceServiceStub(channel).SystemSharedMemoryRegister(request)
        yield
    finally:
        memory.close()
        memory.unlink()
