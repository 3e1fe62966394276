"""An ONNX graph -> the steps that compute its answer from images: constants computed once, what can be joined joined.

ONNX model --what the answer needs--> nodes --known inputs: computed now--> constants
                                        '--others--> steps --joined (program_joining)--> Program
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from export import onnx_file
from export.graph import onnx_parts
from service.audit.gradient.node import Node, Operator, node_from_proto, tensor_from_proto
from service.audit.gradient.operators import operator_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx

# Values of a constant that a step also keeps on the CPU, to be read as numbers: channels of a wide layer.
_READABLE = 4096

_CHANNELS = {1, 3, 4}


@dataclass(frozen=True)
class Step:
    """One node that depends on the images.

    Attributes:
        node: what is computed.
        operator: what computes it.
        inputs: names of its values; "" where one is left out.
        outputs: names of what it makes.
        last: names that nothing needs afterwards.
    """

    node: Node
    operator: Operator
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    last: tuple[str, ...] = ()

    def __call__(self, inputs: Iterable[Tensor | None]) -> tuple[Tensor, ...]:
        """Return what the step makes of its inputs."""
        made = self.operator(self.node, *inputs)
        return made if isinstance(made, tuple) else (made,)


@dataclass(frozen=True)
class Program:
    """The steps from images to an answer.

    Attributes:
        image: the graph's input: NCHW of floats, or NHWC of bytes.
        answer: its output.
        stored: whether it takes bytes.
        steps: in an order in which each finds its inputs.
        constants: by name.
    """

    image: str
    answer: str
    stored: bool
    steps: tuple[Step, ...]
    constants: dict[str, Tensor]

    def tidied(self) -> Program:
        """Return the program without steps and constants that the answer does not need, and with what may be freed."""
        wanted, kept = {self.answer}, []
        for step in reversed(self.steps):
            if wanted.isdisjoint(step.outputs):
                continue
            last = tuple({*step.inputs, *step.outputs} - wanted - {*self.constants, ""})
            wanted |= {*step.inputs}
            kept.append(replace(step, last=last))
        constants = {name: value for name, value in self.constants.items() if name in wanted}
        return replace(self, steps=tuple(reversed(kept)), constants=constants)


def program_from_onnx(model: onnx.ModelProto) -> Program:
    """Return the program of a classifier.

    Args:
        model: as `onnx_file.load` returns it; one input, float NCHW in [0, 1] or uint8 NHWC, and one output.

    Raises:
        ValueError: it is no such classifier, or an operator has no gradient here; it and its node are named.
    """
    model = onnx_file.upgraded(model)
    image, answer, stored = _ends(model)
    opset = next(each.version for each in model.opset_import if each.domain in {"", "ai.onnx"})
    constants = {tensor.name: tensor_from_proto(tensor) for tensor in model.graph.initializer}
    steps = []
    _, needed = onnx_parts.needs(model.graph, answer)
    for proto in needed:
        step = _step(proto, constants, opset=opset)
        if all(name in constants for name in step.inputs if name):
            made = step(constants[name] if name else None for name in step.inputs)
            constants.update(zip(step.outputs, made, strict=False))
        else:
            steps.append(_readable(step))
    return Program(image, answer, stored, tuple(steps), constants)


def _ends(model: onnx.ModelProto) -> tuple[str, str, bool]:
    """Return the names of input and output, and whether the input takes bytes."""
    inputs, outputs = onnx_file.specs(model)
    if len(inputs) != 1 or len(outputs) != 1:
        raise ValueError(f"expected one input and one output, got {len(inputs)} and {len(outputs)}; give a mapping")
    spec = inputs[0]
    stored = spec.datatype == "UINT8"
    channels = spec.shape[-1 if stored else 1] if len(spec.shape) == 4 else 0
    if spec.datatype not in {"FP32", "FP16", "UINT8"} or channels not in _CHANNELS:
        layout = "(n, h, w, c)" if stored else "(n, c, h, w)"
        raise ValueError(
            f"input {spec.name!r}: expected images {layout}, got {spec.datatype} of shape {spec.shape}; give a mapping"
        )
    return spec.name, outputs[0].name, stored


def _step(proto: onnx.NodeProto, constants: dict[str, Tensor], *, opset: int) -> Step:
    known = {position: constants[name] for position, name in enumerate(proto.input) if name in constants}
    node = replace(node_from_proto(proto, opset=opset), constants=known)
    return Step(node, operator_of(node), tuple(proto.input), tuple(proto.output))


def _readable(step: Step) -> Step:
    """Return a step that does not keep its weights a second time."""
    small = {position: value for position, value in step.node.constants.items() if value.numel() <= _READABLE}
    return replace(step, node=replace(step.node, constants=small))


def alike(left: Tensor | None, right: Tensor | None) -> bool:
    """Return whether two constants are the same, or both are left out."""
    if left is None or right is None:
        return left is right
    return left.dtype == right.dtype and torch.equal(left, right)
