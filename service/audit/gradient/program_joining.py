"""Steps of a program that are joined or exchanged: faster, or with a gradient where there was none.

Conv, BatchNormalization       -> Conv with other weights
QuantizeLinear, Dequantize...  -> one step of torch's own
Round, Cast to bytes           -> rounding that passes the gradient straight through
Softmax at the end             -> its logarithm: the same classes, and a gradient where probabilities are 0 or 1
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import onnx

from service.audit.gradient.operators import operator_of
from service.audit.gradient.operators_quantisation import levels
from service.audit.gradient.program import Program, Step, alike

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

# Operators that pass scores on as they are.
_PASSING = {"Identity", "Cast", "Flatten", "Reshape", "Squeeze"}

_BYTES = {onnx.TensorProto.UINT8, onnx.TensorProto.INT8}


def joined(program: Program) -> Program:
    """Return the program with all that can be joined, and nothing that is not needed."""
    for change in (_batch_norms, _quantisations, _roundings, _logarithm):
        program = change(program).tidied()
    return program


def _batch_norms(program: Program) -> Program:
    """Put BatchNormalization into the weights of the convolution before it."""
    made, uses = _producers(program), _uses(program)
    steps, constants = {step.outputs[0]: step for step in program.steps}, dict(program.constants)
    for step in program.steps:
        before = made.get(step.inputs[0])
        if step.node.operator != "BatchNormalization" or before is None or before.node.operator != "Conv":
            continue
        known = all(name in constants for name in (before.inputs[1], *before.inputs[2:], *step.inputs[1:]) if name)
        if not known or uses[step.inputs[0]] != 1 or step.node.get("training_mode", 0):
            continue
        output = step.outputs[0]
        names = (f"{output}/kernels", f"{output}/bias")
        constants[names[0]], constants[names[1]] = _folded(before, step, constants)
        small = {position: value for position, value in before.node.constants.items() if position == 0}
        node = replace(before.node, constants=small)
        steps[output] = replace(before, node=node, inputs=(before.inputs[0], *names), outputs=(output,))
    return replace(program, steps=tuple(steps.values()), constants=constants)


def _folded(convolution: Step, norm: Step, constants: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the kernels and the bias that do both; computed in float64, since nothing of it is done twice."""
    kernels, *bias = (constants[name].double() for name in convolution.inputs[1:] if name)
    scale, shift, mean, variance = (constants[name].double() for name in norm.inputs[1:])
    factor = scale / (variance + norm.node.get("epsilon", 1e-5)).sqrt()
    moved = shift + ((bias[0] if bias else 0) - mean) * factor
    return (kernels * factor.reshape(-1, *(1,) * (kernels.dim() - 1))).float(), moved.float()


def _quantisations(program: Program) -> Program:
    """Join each QuantizeLinear with the DequantizeLinear behind it, where one scale holds for the whole tensor."""
    made = _producers(program)
    return _mapped(program, lambda step: _pair(program, step, made.get(step.inputs[0])))


def _pair(program: Program, step: Step, before: Step | None) -> Step:
    if step.node.operator != "DequantizeLinear" or before is None or before.node.operator != "QuantizeLinear":
        return step
    first, second = (_parameters(program, each) for each in (before, step))
    if first[0] is None or first[0].numel() != 1 or not all(map(alike, first, second)):
        return step
    levels(before.node)
    node = replace(before.node, operator="QuantizeDequantize", domain="", name=step.node.name)
    return Step(node, operator_of(node), before.inputs, step.outputs)


def _parameters(program: Program, step: Step) -> tuple[Tensor | None, Tensor | None]:
    scale, zero = (*step.inputs[1:], "")[:2]
    return program.constants.get(scale), program.constants.get(zero)


def _roundings(program: Program) -> Program:
    """Let rounding to bytes pass the gradient, as the quantisation that it is."""
    casts = [s for s in program.steps if s.node.operator == "Cast" and s.node.get("to") in _BYTES]
    rounded = Counter(step.inputs[0] for step in casts)
    uses = _uses(program)

    def passing(step: Step) -> Step:
        output = step.outputs[0]
        if step.node.operator != "Round" or not rounded[output] or rounded[output] != uses[output]:
            return step
        node = replace(step.node, operator="RoundToLevels")
        return replace(step, node=node, operator=operator_of(node))

    return _mapped(program, passing)


def _logarithm(program: Program) -> Program:
    """Exchange the Softmax that the answer ends in for its logarithm."""
    made = _producers(program)
    last = made.get(program.answer)
    while last is not None and last.node.operator in _PASSING:
        last = made.get(last.inputs[0])
    if last is None or last.node.operator != "Softmax":
        return program
    node = replace(last.node, operator="LogSoftmax")
    changed = replace(last, node=node, operator=operator_of(node))
    return _mapped(program, lambda step: changed if step is last else step)


def _mapped(program: Program, change: Callable[[Step], Step]) -> Program:
    return replace(program, steps=tuple(map(change, program.steps)))


def _producers(program: Program) -> dict[str, Step]:
    return {name: step for step in program.steps for name in step.outputs if name}


def _uses(program: Program) -> Counter[str]:
    return Counter([program.answer, *(name for step in program.steps for name in step.inputs)])
