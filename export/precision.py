"""ONNX fp32 file -> ONNX fp16 or int8 file, with the layers that must not be rounded left in fp32.

fp32 file --fp16.converter | int8.quantiser--> graph --onnx.checker--> file, and what it keeps in fp32
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx

from export.graph import onnx_parts, preparation
from export.rounding import fp16, int8

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from export.manifest import Method, Target
    from export.rounding.calibration import Inputs


def fp16_from_onnx(
    source: Path, path: Path, *, keep: Sequence[str] = (), inputs: Inputs | None = None
) -> tuple[str, ...]:
    """Write the fp16 version of an ONNX file; what it takes and answers keeps its types.

    Images are normalised in fp32. Nodes whose weights are beyond what fp16 holds stay in fp32, and where images are
    given, so do those whose activations reach a quarter of it.

    Args:
        source: the fp32 file.
        path: the file to write.
        keep: names of nodes to keep in fp32, as `sensitivity` reports them or as they stand in the source.
        inputs: (N, ...) images as the graph takes them.

    Returns:
        The names of the nodes left in fp32.

    Raises:
        ValueError: the file cannot be taken, or has no node of a name to keep.
    """
    return _written(fp16.converter(source, inputs=inputs), path, source=source, keep=keep)


def int8_from_onnx(
    source: Path,
    path: Path,
    *,
    inputs: Inputs,
    target: Target = "cpu",
    method: Method = "minmax",
    percentile: float = 99.99,
    keep: Sequence[str] = (),
) -> tuple[str, ...]:
    """Write the int8 version of an ONNX file; its first convolution and its last product stay in fp32.

    Args:
        source: the fp32 file.
        path: the file to write.
        inputs: (N, ...) images as the graph takes them, from the training data: activation ranges come from them.
        target: "cpu" for U8 activations and S8 weights per channel, which is the fast form on CPUs with VNNI;
            "tensorrt" for S8 activations and weights, symmetric, with a pair of QuantizeLinear and DequantizeLinear
            for each layer's input, and fp32 biases.
        method: how ranges are chosen (`calibration.ranges`).
        percentile: the share of values that a range holds, in percent; only of method "percentile".
        keep: names of further nodes to keep in fp32, as `sensitivity` reports them or as they stand in the source.

    Returns:
        The names of the nodes kept in fp32 that would have been quantised.

    Raises:
        ValueError: there are no images or they do not fit the graph, the file cannot be taken, it has no node of a
            name to keep, or no layer is left to quantise.
    """
    made = int8.quantiser(source, inputs=inputs, target=target, method=method, percentile=percentile)
    return _written(made, path, source=source, keep=keep)


def _written(
    made: fp16.Converter | int8.Quantiser, path: Path, *, source: Path, keep: Sequence[str]
) -> tuple[str, ...]:
    names = made.prepared.resolved(keep)
    if not any(node.op_type in preparation.WEIGHTED for node in made.candidates(names)):
        raise ValueError(
            f"{source}: expected a layer to convert, found none: those there are stay in fp32, as what is kept or as "
            "the first convolution and the last product; keep fewer, or stay with fp32"
        )
    model = made.graph(kept=names)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ValueError(
            f"{source}: what was made of it is not a valid graph: {onnx_parts.reason(error)}; keep the node in fp32, "
            "or start from a fp32 file"
        ) from error
    path.write_bytes(model.SerializeToString(deterministic=True))
    return made.kept(names)
