"""Sources of gradients: models on this machine that answer as the target does, and can be differentiated.

version --checkpoint--> module --\
   '------its ONNX file--> module --prepared, answers compared with the target's--> Source | why it was refused

A source only has to point the right way - what fools a target is decided on the target - but one that answers
otherwise points elsewhere: it is refused, with the number.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import nn

from export import foreign, manifest, onnx_file, twin
from export.graph import onnx_parts
from service.audit.gradient.onnx_module import module_from_model, module_from_onnx
from service.audit.gradient.preparation import prepared

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float32
    from torch import Tensor

    from export.mapping import Mapping
    from export.repository import Repository, Version
    from service.audit.target.base import Target

Name = Literal["checkpoint", "onnx"]
Wanted = Literal["auto", "checkpoint", "onnx", "all"]

# Share of clean images on which a source must name the target's class. An int8 runtime's own optimised and unoptimised
# answers differ by as much, so that logits cannot be compared more closely.
AGREEMENT = 0.99

# Images at once when answers are compared: what a large network takes at 224 x 224 in one GB.
_CHUNK = 32

# What is tried for what is wanted, in this order: the checkpoint's own model is the faster one.
_TRIED: dict[Wanted, tuple[Name, ...]] = {
    "auto": ("checkpoint", "onnx"),
    "all": ("checkpoint", "onnx"),
    "checkpoint": ("checkpoint",),
    "onnx": ("onnx",),
}


@dataclass(frozen=True)
class Source:
    """A differentiable model of the target.

    Attributes:
        name: where it comes from.
        module: float32 NCHW in [0, 1] -> logits; frozen, in evaluation mode.
        agreement: share of clean images on which it names the target's class.
    """

    name: Name
    module: nn.Module
    agreement: float

    def __call__(self, images: Float32[Tensor, "n c h w"]) -> Float32[Tensor, "n classes"]:
        """Return the logits, on the device of the images; differentiable."""
        logits: Tensor = self.module(images.to(self.device))
        if images.requires_grad and not logits.requires_grad:
            # A model whose answers do not depend on its input has a gradient: zero.
            logits = logits + 0 * images.sum()
        return logits.to(images.device)

    @property
    def device(self) -> torch.device:
        """Where it computes: attacks are fastest if their images are there."""
        return next(self.module.parameters()).device


@dataclass(frozen=True)
class Found:
    """What gradients can be taken from.

    Attributes:
        sources: those that agree with the target, in the order in which they were wanted.
        refused: why others are not among them, for the reader of a report.
    """

    sources: tuple[Source, ...]
    refused: tuple[str, ...]


def sources(
    version: Version | Path,
    *,
    repository: Repository | None,
    wanted: Wanted,
    target: Target,
    images: Float32[Tensor, "n c h w"],
    mapping: Mapping | None = None,
    device: torch.device | None = None,
) -> tuple[Source, ...]:
    """Return the sources that are wanted; arguments and errors are those of `found`."""
    return found(
        version, repository=repository, wanted=wanted, target=target, images=images, mapping=mapping, device=device
    ).sources


def found(
    version: Version | Path,
    *,
    repository: Repository | None,
    wanted: Wanted,
    target: Target,
    images: Float32[Tensor, "n c h w"],
    mapping: Mapping | None = None,
    device: torch.device | None = None,
) -> Found:
    """Return the sources that are wanted, and why others were refused.

    Args:
        version: whose gradients: the engine that is attacked, or the twin of an endpoint; or an ONNX file.
        repository: where its checkpoint is looked for.
        wanted: "auto" for the first that agrees; "all" for all that do.
        target: what is attacked; it is asked about the images once.
        images: clean.
        mapping: what an ONNX file takes and gives, where that is not float32 NCHW in [0, 1].
        device: where sources compute; a GPU if there is one, by default.

    Raises:
        FileNotFoundError, ValueError: there is none of those wanted, or none that agrees; one line says why of each.
    """
    if len(images) == 0:
        raise ValueError("images: expected some to compare a source with its target on, got none; give clean images")
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sent = target.domain.sent(images)
    expected = target.predict(np.ascontiguousarray(sent.cpu().numpy()))
    accepted, refused = [], []
    for name in _TRIED[wanted]:
        try:
            module = _module(name, version, repository=repository, mapping=mapping, target=target)
            accepted.append(_accepted(name, module, images=sent, expected=expected, device=device))
        except (FileNotFoundError, ValueError) as error:
            refused.append(f"{name}: {error}")
            continue
        if wanted == "auto":
            break
    if not accepted:
        raise ValueError(f"gradients = {wanted!r}: expected a source of gradients, got none: {'; '.join(refused)}")
    return Found(tuple(accepted), tuple(refused))


def onnx_of(version: Version) -> Path:
    """Return the ONNX file of a version: its engine, or what its plan was built from; its sha256 is checked.

    Raises:
        FileNotFoundError: the plan came without one, or the file is missing.
        ValueError: it is not the file that was published.
    """
    described = version.manifest
    name = described.file if described.file == "model.onnx" else described.build.onnx
    if name is None:
        raise FileNotFoundError(f"{version}: expected the ONNX file of its plan, found none; publish the plan again")
    path = version.folder / name
    expected = described.sha256 if name == described.file else described.files.get(name)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the ONNX file of {version} here, found none; export it again")
    if manifest.sha256_of(path) != expected:
        raise ValueError(f"{path}: expected the file that was published, got another; export the model again")
    return path


def _module(
    name: Name, version: Version | Path, *, repository: Repository | None, mapping: Mapping | None, target: Target
) -> nn.Module:
    if name == "onnx":
        return _from_file(version, mapping, target) if isinstance(version, Path) else module_from_onnx(onnx_of(version))
    module = None if isinstance(version, Path) or repository is None else twin.load(version, repository=repository)
    if module is None:
        raise FileNotFoundError(f"{version} has no checkpoint; export it with one, or take gradients from its ONNX")
    return module


def _from_file(path: Path, mapping: Mapping | None, target: Target) -> nn.Module:
    """Return the module of anybody's ONNX file, with our input and output."""
    model = onnx_file.load(path)
    try:
        adapted = foreign.adapted(model, mapping or foreign.Mapping(), class_names=target.class_names)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return module_from_model(adapted.model, where=str(path))


def _accepted(
    name: Name,
    module: nn.Module,
    *,
    images: Tensor,
    expected: np.ndarray[tuple[int], np.dtype[np.int64]],
    device: torch.device,
) -> Source:
    try:
        ready = prepared(module.to(device, torch.float32), example=images[:_CHUNK].to(device))
        agreement = float((_predicted(ready, images, device) == expected).mean())
    except RuntimeError as error:  # what torch says of shapes that do not fit
        shape = tuple(images.shape[1:])
        raise ValueError(f"expected a model of images {shape}, got another: {onnx_parts.reason(error)}") from error
    if agreement < AGREEMENT:
        raise ValueError(
            f"expected a model that names the target's class for {AGREEMENT:.0%} of the clean images, got "
            f"{agreement:.1%} of {len(images)}; it is another model, or another precision"
        )
    return Source(name, ready, agreement)


def _predicted(
    module: Callable[[Tensor], Tensor], images: Tensor, device: torch.device
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    with torch.no_grad():
        answers = [module(chunk.to(device)).argmax(dim=1).cpu() for chunk in torch.split(images, _CHUNK)]
    return torch.cat(answers).numpy()
