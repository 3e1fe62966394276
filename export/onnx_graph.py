"""A PyTorch module -> ONNX graph: named dynamic batch, normalisation inside, nothing of this machine in the file.

module --finite weights, size--> with uint8 or softmax around it --torch.export--> graph --stripped, checked--> file
"""

from __future__ import annotations

import io
import json
import logging
import re
import warnings
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import onnx
import torch
from torch import nn

from export import onnx_file
from export.graph import batch_dimension, onnx_parts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from export.manifest import TensorSpec

# What the exporter's errors say of the operator, and of the user's line, that they are about.
_UNKNOWN_OPERATOR = re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)'")
_USER_CODE = re.compile(r'File "([^"]+)", line (\d+), in \S+\n +(.+)')

# Value of white in a uint8 image.
_WHITE = 255


def onnx_from_module(
    module: nn.Module,
    path: Path,
    *,
    image_shape: tuple[int, int, int],
    class_names: tuple[str, ...],
    input: Literal["float32", "uint8"] = "float32",  # noqa: A002 - what the command line calls it
    output: Literal["logits", "probabilities"] = "logits",
) -> None:
    """Write a classifier as an ONNX file: the same bytes for the same module.

    Args:
        module: (N, C, H, W) float32 in [0, 1] -> (N, classes) logits, in eval mode.
        path: the file to write.
        image_shape: (C, H, W).
        class_names: stored as JSON in the file's metadata under "class_names".
        input: what the graph's input `images` takes: "float32" as the module does, or "uint8" (N, H, W, C).
        output: what the graph answers with, and its output's name: the module's logits, or their softmax.

    Raises:
        ValueError: the module cannot be exported; one line has the exporter's reason, or names the parameter that is
            not finite, or what about the graph is not as it must be.
    """
    assert not module.training, "a module is exported in eval mode"
    _check_weights(module)
    channels, height, width = image_shape
    # A batch of one would be specialised: the exporter takes a size of 1 for a constant.
    example = torch.zeros(2, *image_shape)
    if input == "uint8":
        module, example = _FromUint8(module), torch.zeros(2, height, width, channels, dtype=torch.uint8)
    if output == "probabilities":
        module = nn.Sequential(module, nn.Softmax(dim=-1))
    model = _exported(module.eval(), example, output)
    _check_output(model, output, classes=len(class_names))
    onnx_file.strip(model)
    model.metadata_props.add(key="class_names", value=json.dumps(class_names))
    onnx.checker.check_model(model, full_check=True)
    onnx_file.write(model, path)


def specs(path: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return the inputs and outputs of an ONNX file, -1 for every named dimension."""
    return onnx_file.specs(onnx.load(path))


class _FromUint8(nn.Module):
    """A module with the conversion of uint8 images before it; TensorRT parses nothing but a Cast on uint8."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        # Contiguous, since a module may take views of its input.
        answers: Tensor = self.module(images.to(torch.float32).permute(0, 3, 1, 2).contiguous() / _WHITE)
        return answers


def _exported(module: nn.Module, example: Tensor, output: str) -> onnx.ModelProto:
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                verbose=False,
                opset_version=onnx_file.OPSET,
                input_names=[onnx_file.INPUT],
                output_names=[output],
                dynamic_shapes=({0: torch.export.Dim(batch_dimension.NAME)},),
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ValueError(f"the model cannot be exported to ONNX: {_reason(error)}; change its forward") from error
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    return model


def _reason(error: BaseException) -> str:
    """Return the first cause of an exporter's error, in one line: the ones above it only say that there was one."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error)
    if operator := _UNKNOWN_OPERATOR.search(text):
        return f"operator {operator[1]} has no counterpart in ONNX"
    where = [f" ({Path(file).name}, line {line}: {code})" for file, line, code in _USER_CODE.findall(text)]
    return f"{type(error).__name__}: {onnx_parts.reason(error)}{''.join(where[-1:])}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's logs, warnings and listings from the user: what matters of them is in its errors."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            # The exporter trips over deprecations inside torch itself.
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _check_weights(module: nn.Module) -> None:
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    onnx_file.check_size(sum(tensor.numel() * tensor.element_size() for tensor in state.values()))
    for name, tensor in state.items():
        # An infinity in a buffer may be a mask; in a parameter it is damage, as NaN is everywhere.
        sound = torch.isfinite(tensor) if isinstance(tensor, nn.Parameter) else ~torch.isnan(tensor)
        if not sound.all():
            raise ValueError(
                f"{name!r}: expected finite weights, got NaN or infinity in {int((~sound).sum())} of {tensor.numel()} "
                "places; take weights from before training diverged"
            )


def _check_output(model: onnx.ModelProto, output: str, *, classes: int) -> None:
    """Compare the graph's output with (batch, classes): the exporter takes what a forward fixes without a word."""
    first, *others = model.graph.output
    shape = tuple(dim.dim_param or dim.dim_value for dim in first.type.tensor_type.shape.dim)
    element = first.type.tensor_type.elem_type
    if others:
        raise ValueError(f"{output}: expected one output, got {len(others) + 1}; return the {output} alone")
    if element != onnx.TensorProto.FLOAT:
        got = onnx.TensorProto.DataType.Name(element).lower()
        raise ValueError(f"{output}: expected float32, got {got}; return scores from the module's forward")
    if shape[:1] != (batch_dimension.NAME,):
        raise ValueError(
            f"{output}: expected one row an image, got shape {shape} for any batch; the module's forward fixes the "
            "batch or mixes its images: take its size from the input's shape"
        )
    if shape[1:] != (classes,):
        raise ValueError(
            f"{output}: expected shape ('{batch_dimension.NAME}', {classes}) for {classes} class names, got {shape}; "
            "name each class, or return scores alone"
        )
