"""What an engine's answers are compared with: its source's, its PyTorch twin's, or the original ONNX file's.

variant        -> the engine it was made from, run by ONNX Runtime on the CPU
run, network   -> the PyTorch model
foreign ONNX   -> the file as it came, fed as its mapping says
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from export import foreign, onnx_file, twin
from export.engines import open_engine, ort
from export.engines.failures import one_line
from export.mapping import Mapping, feed
from export.parity import batched

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

    from export.engines.base import Images, Logits
    from export.repository import Repository, Version

# What an imported version keeps of what it was made from, so that its proof can be repeated.
ORIGINAL = "original.onnx"
MAPPING = "mapping.json"

# What a proof calls the PyTorch model of a run of ours, and that of somebody else's weights.
CHECKPOINT, NETWORK = "PyTorch checkpoint", "PyTorch network"

# Images a foreign graph is given at once.
_BATCH = 64

# Bytes of images a PyTorch model is given at once: 3 of 224 x 224. In batches of 64 ResNet-50 takes almost twice as
# long on a CPU, since PyTorch asks the system for each activation's memory anew.
_STEP_BYTES = 2 << 20


@dataclass(frozen=True)
class Reference:
    """Something that gives the answers that an engine should give.

    Attributes:
        name: for the reader of a proof.
        answers: float32 (N, C, H, W) in [0, 1] -> (N, classes), in the engine's kind of output.
    """

    name: str
    answers: Callable[[Images], Logits]


def of_engine(version: Version) -> Reference:
    """Return a published engine as a reference."""

    def answers(images: Images) -> Logits:
        with open_engine(version.folder) as engine:
            return engine.classify(images)

    return Reference(str(version), answers)


def of_module(module: nn.Module, *, name: str, output: str) -> Reference:
    """Return a PyTorch model, which gives logits, as a reference for "logits" or "probabilities"."""

    def answer(batch: Images) -> Logits:
        with torch.inference_mode():
            logits = module(torch.from_numpy(batch))
            if not isinstance(logits, torch.Tensor):
                kind = type(logits).__name__
                raise ValueError(f"the network: expected logits (N, classes), got {kind}; return its scores alone")
            return np.asarray((logits.softmax(dim=1) if output == "probabilities" else logits).numpy())

    return Reference(name, lambda images: batched(answer, images, batch=max(1, _STEP_BYTES // images[:1].nbytes)))


def of_original(path: Path, mapping: Mapping, *, name: str, class_names: tuple[str, ...]) -> Reference:
    """Return a foreign ONNX file, as it came, as a reference."""

    def answers(images: Images) -> Logits:
        adapted = foreign.adapted(onnx_file.load(path), mapping, class_names=class_names)
        session, native = ort.open_session(path), adapted.native
        fixed = max(native.shape[0], 0)

        def answer(batch: Images) -> Logits:
            # A graph of a fixed batch takes no less: the last one is filled up, and what that gives left out.
            full = np.resize(batch, (fixed, *batch.shape[1:])) if fixed else batch
            with one_line(path.name):
                (given,) = session.run([adapted.native_output], {native.name: feed(full, mapping, native)})
            return np.asarray(given, dtype=np.float32).reshape(len(full), -1)[: len(batch)]

        return batched(answer, images, batch=fixed or _BATCH)

    return Reference(name, answers)


def of_version(version: Version, *, repository: Repository) -> Reference:
    """Return what a published version was proved against.

    Raises:
        FileNotFoundError: it has been removed.
        ValueError: the version has nothing to be compared with.
    """
    manifest = version.manifest
    if manifest.source is not None:
        return of_engine(repository.find(manifest.source.model, manifest.source.version))
    if (version.folder / ORIGINAL).is_file():
        mapping = Mapping.model_validate_json((version.folder / MAPPING).read_bytes())
        name = "the imported file" if manifest.provenance is None else manifest.provenance.file
        return of_original(version.folder / ORIGINAL, mapping, name=name, class_names=manifest.class_names)
    module = twin.load(version, repository=repository)
    if module is None:
        raise ValueError(f"{version}: expected a source or a checkpoint to compare with, found none; export it again")
    own = manifest.provenance is not None and manifest.provenance.kind == "weights"
    return of_module(module, name=NETWORK if own else CHECKPOINT, output=manifest.output)
