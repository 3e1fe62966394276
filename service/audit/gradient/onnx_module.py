"""An ONNX file as a torch module that gradients can be taken through: no Python source of the network is needed.

ONNX file --load, upgrade--> model --program--> steps, constants
images, float32 NCHW in [0, 1] --[x 255, rounded, NHWC: a graph of bytes]--> steps, one after the other --> logits

What a file computes in float16 is computed in float32, quantisation is passed straight through
(operators_quantisation), and a file that ends in Softmax answers with logarithms, of which softmax makes the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from export import onnx_file
from service.audit.gradient.operators_quantisation import straight_through
from service.audit.gradient.operators_shapes import READ_AS_NUMBERS
from service.audit.gradient.program import program_from_onnx
from service.audit.gradient.program_joining import joined

if TYPE_CHECKING:
    from pathlib import Path

    import onnx
    from jaxtyping import Float32

    from service.audit.gradient.program import Program, Step

# Grey levels above black of an 8-bit image.
_WHITE = 255


class OnnxModule(nn.Module):
    """A program as a module: its float constants are frozen parameters, so that it moves as any module does."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self._image, self._answer, self._stored = program.image, program.answer, program.stored
        self._steps = program.steps
        moving = {
            name: value for name, value in program.constants.items() if value.dtype in {torch.float32, torch.bool}
        }
        # Shapes and indices stay on the CPU, where torch reads them.
        self._whole = {name: value for name, value in program.constants.items() if name not in moving}
        self._names = tuple(moving)
        for index, value in enumerate(moving.values()):
            self.register_parameter(f"constant_{index}", nn.Parameter(value.clone(), requires_grad=False))

    def forward(self, images: Float32[Tensor, "n c h w"]) -> Float32[Tensor, "n classes"]:
        """Return the logits."""
        values = {**self._whole, **dict(zip(self._names, self.parameters(recurse=False), strict=True))}
        values[self._image] = self._entering(images)
        for step in self._steps:
            made = step(_together(step, [values[name] if name else None for name in step.inputs], images.device))
            values.update(zip(step.outputs, made, strict=False))
            for name in step.last:
                values.pop(name, None)
        return values[self._answer].flatten(1)

    def _entering(self, images: Tensor) -> Tensor:
        if not self._stored:
            return images
        levels = images * _WHITE
        return straight_through(levels, levels.round()).permute(0, 2, 3, 1)


def module_from_onnx(path: Path) -> OnnxModule:
    """Return the module of an ONNX file, in evaluation mode.

    Its forward takes float32 (n, C, H, W) in [0, 1] and returns logits (n, classes), whatever the file takes: float
    NCHW in [0, 1], or uint8 NHWC.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such classifier, or an operator has no gradient here; it and its node are named.
    """
    return module_from_model(onnx_file.load(path), where=str(path))


def module_from_model(model: onnx.ModelProto, *, where: str) -> OnnxModule:
    """Return the module of a model that `onnx_file.load` returned; `where` is named in errors, as in the other."""
    try:
        with torch.no_grad():
            module = OnnxModule(joined(program_from_onnx(model)))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return module.eval()


def _together(step: Step, inputs: list[Tensor | None], device: torch.device) -> list[Tensor | None]:
    """Return inputs on one device, that of the images if any of them is there."""
    if device.type == "cpu" or step.node.operator in READ_AS_NUMBERS:
        return inputs
    if all(value is None or value.device.type == "cpu" for value in inputs):
        return inputs
    return [None if value is None else value.to(device) for value in inputs]
