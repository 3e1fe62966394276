"""The batch dimension of a graph: named, proved by shape inference, and put in the place of a fixed one.

graph of a fixed batch --targets of Reshape, class tokens--> graph of any batch --inferred, run--> checked
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnxruntime

from export.engines.session_options import session_options
from export.graph import onnx_parts

NAME = "batch"

# Images in the batch for which shapes are inferred: no dimension of a graph is likely to be this by chance.
_PROBE = 1009

# ONNX Runtime's log severity "fatal": what it says of a run that fails is in its exception.
_LOG_NOTHING = 4


def release(model: onnx.ModelProto, *, image: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Make a graph of a fixed batch, in place, one of any batch.

    Args:
        model: constant targets of its Reshapes may name the batch, and constants may stand beside the values of its
            one image (a class token); those are changed.
        image: the input that has the batch as its first dimension; the caller changes its shape.
        shapes: of the graph's values for the fixed batch (onnx_parts.shapes).

    Raises:
        ValueError: the batch stands in a target where it cannot be replaced.
    """
    graph, batch = model.graph, shapes[image][0]
    computed = onnx_parts.depending(graph, image)
    taken = onnx_parts.value_names(graph)
    for node in list(graph.node):
        if node.op_type == "Reshape" and node.input[0] in computed:
            _release_target(graph, node, batch, shapes=shapes, taken=taken)
        elif node.op_type == "Concat" and computed.intersection(node.input):
            _release_tokens(model, node, image, batch, computed=computed, taken=taken)


def _release_target(
    graph: onnx.GraphProto,
    node: onnx.NodeProto,
    batch: int,
    *,
    shapes: dict[str, tuple[int, ...]],
    taken: set[str],
) -> None:
    """Replace the batch in the constant target of a Reshape; other nodes may share the constant, so it stays."""
    tensor = onnx_parts.constant(graph, node.input[1])
    target = [] if tensor is None else onnx.numpy_helper.to_array(tensor).tolist()
    if target and target[0] == batch:
        target[0] = _any_batch(node, target, keeps_batch=shapes.get(node.input[0], (-1,))[:1] == (batch,))
        name = onnx_parts.free_name(f"{node.input[1]}_any_batch", taken=taken)
        graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(target, dtype=np.int64), name))
        node.input[1] = name


def _any_batch(node: onnx.NodeProto, target: list[int], *, keeps_batch: bool) -> int:
    """Return what stands for the batch in a target: 0 copies the input's dimension, -1 is what is left over."""
    zero_is_zero = [attribute for attribute in node.attribute if attribute.name == "allowzero" and attribute.i]
    if keeps_batch and not (zero_is_zero and 0 in target):
        for attribute in zero_is_zero:
            node.attribute.remove(attribute)
        return 0
    if -1 not in target[1:]:
        return -1
    raise ValueError(
        f"node {onnx_parts.label(node)!r} reshapes to {target}: its batch of {target[0]} cannot be replaced; "
        "export the model with a dynamic batch"
    )


def _release_tokens(
    model: onnx.ModelProto, node: onnx.NodeProto, image: str, batch: int, *, computed: set[str], taken: set[str]
) -> None:
    """Repeat, for each image, a constant that a Concat puts beside the image's values: a class token, say."""
    graph, axis = model.graph, next(attribute.i for attribute in node.attribute if attribute.name == "axis")
    for index, name in enumerate(node.input):
        token = None if name in computed else onnx_parts.folded(model, name)
        if token is None or token.ndim < 2 or axis in {0, -token.ndim} or not _repeats(token, batch):
            continue
        result = onnx_parts.free_name(f"{name}_per_image", taken=taken)
        where = list(graph.node).index(node)
        for step in reversed(_expansion(graph, image, token[:1], result, taken=taken)):
            graph.node.insert(where, step)
        node.input[index] = result


def _repeats(token: np.ndarray[Any, Any], batch: int) -> bool:
    return len(token) == batch and bool((token == token[:1]).all())


def _expansion(
    graph: onnx.GraphProto, image: str, token: np.ndarray[Any, Any], result: str, *, taken: set[str]
) -> list[onnx.NodeProto]:
    """Return the nodes that repeat a constant along its first dimension, once for each image."""
    parts = ("sizes", "batch", "target", "first", "others", "once")
    sizes, batch, target, first, others, once = (
        onnx_parts.free_name(f"{result}_{part}", taken=taken) for part in parts
    )
    constants = {first: np.asarray([0]), others: np.asarray(token.shape[1:]), once: token}
    graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    return [
        onnx.helper.make_node("Shape", [image], [sizes], name=sizes),
        onnx.helper.make_node("Gather", [sizes, first], [batch], name=batch, axis=0),
        onnx.helper.make_node("Concat", [batch, others], [target], name=target, axis=0),
        onnx.helper.make_node("Expand", [once, target], [result], name=result),
    ]


def check(model: onnx.ModelProto, *, image: str, output: str) -> tuple[int, ...]:
    """Return the shape of a graph's output for one image, -1 for what cannot be inferred.

    Raises:
        ValueError: the graph does not take a batch of any size, though its input says so.
    """
    probe = onnx_parts.without_weights(model)
    for value in probe.graph.input:
        if value.name == image:
            value.type.tensor_type.shape.dim[0].dim_value = _PROBE
    for value in probe.graph.output:
        # A declared shape would be believed, or contradict what is inferred.
        value.type.tensor_type.ClearField("shape")
    try:
        shapes = onnx_parts.shapes(probe)
    except ValueError as error:
        raise ValueError(f"the graph takes no batch of any size: {error}; export it with a dynamic batch") from error
    _check_sizes(probe.graph, shapes)
    shape = shapes.get(output, ())
    if shape and shape[0] not in {_PROBE, -1}:
        raise ValueError(
            f"output {output!r}: expected one answer for each image, got shape {shape} for {_PROBE} images; "
            "export the model with a dynamic batch"
        )
    return shape


def try_out(model: onnx.ModelProto, image: np.ndarray[Any, Any]) -> None:
    """Run a graph whose batch was released, since shape inference sees through no more than most of a graph.

    Args:
        model: of one input.
        image: a batch of another size than the one it was made for.

    Raises:
        ValueError: it does not run.
    """
    options = session_options()
    options.log_severity_level = _LOG_NOTHING
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        session.run(None, {model.graph.input[0].name: image})
    except Exception as error:
        raise ValueError(
            f"the graph does not run on a batch of {len(image)} though its fixed batch was replaced: "
            f"{onnx_parts.reason(error)}; export the model with a dynamic batch"
        ) from error


def _check_sizes(graph: onnx.GraphProto, shapes: dict[str, tuple[int, ...]]) -> None:
    """Compare the sizes on both sides of each Reshape and Concat: shape inference believes their constants."""
    for node in graph.node:
        if node.op_type not in {"Reshape", "Concat"}:
            continue
        data = node.input if node.op_type == "Concat" else node.input[:1]
        before, after = [shapes.get(name, (-1,)) for name in data], shapes.get(node.output[0], (-1,))
        known = all(-1 not in shape for shape in (*before, after))
        if known and sum(map(math.prod, before)) != math.prod(after):
            raise ValueError(
                f"node {onnx_parts.label(node)!r} ({node.op_type}) makes {after} of {', '.join(map(str, before))} for "
                f"a batch of {_PROBE}: it was made for one size of batch; export the model with a dynamic batch"
            )
