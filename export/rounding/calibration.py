"""Ranges of a graph's activations over images, in memory that grows neither with their number nor with their size.

images --a few at a time--> graph + ReduceMin, ReduceMax, Size of each tensor --> lowest, highest    (min-max ends here)
images --a few at a time--> graph, its tensors as outputs --> histograms of fixed width --> percentile | entropy

ONNX Runtime's own calibrators of histograms hold every activation of every image until the last image is through.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import onnx
import onnxruntime
from jaxtyping import Float32, Int64
from onnx import TensorProto, helper
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData

from export.engines.session_options import session_options
from export.manifest import Method

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    Inputs = np.ndarray[Any, Any]

# Bytes of images, as float32, in one run of the graph: three of 224 x 224. A tensor of 64 channels takes 21 times that.
_STEP_BYTES = 2 << 20

# Images in one run at most: more are no faster, however small they are.
_STEP_IMAGES = 32

# Bytes of activations that are held at once for their histograms.
_HELD_BYTES = 256 << 20

# Values whose bins are computed at once: the temporary arrays stay in the processor's cache.
_CHUNK_VALUES = 1 << 18

# Of a histogram from which a percentile is read: ranges are right to 1/8192 of the largest value.
_PERCENTILE_BINS = 16_385

# Half as fine as TensorRT's 2048 bins of absolute values: 1024 on either side of zero, and one around it.
_ENTROPY_BINS = 2 * 1024 + 1

# Levels that the entropy calibrator compares with: TensorRT's 128, the positive ones of int8.
_LEVELS = 128

# What smoothing gives to an empty bin, in values (ONNX Runtime's).
_SMOOTHING = 1e-4

# Of values as small as this the bins would be narrower than float32 can tell apart; the quantiser takes them for zero.
_NOTHING = 1e-30

_METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}


@dataclass
class _Extent:
    """What the first pass learns of a tensor."""

    lowest: float = math.inf
    highest: float = -math.inf
    values_per_image: int = 0

    @property
    def limit(self) -> float:
        return max(abs(self.lowest), abs(self.highest))


def ranges(
    model: onnx.ModelProto,
    inputs: Inputs,
    *,
    tensors: Sequence[str],
    method: Method = "minmax",
    percentile: float = 99.99,
    symmetric: bool = False,
) -> TensorsData:
    """Return the ranges of activations, as ONNX Runtime's quantiser takes them.

    Args:
        model: a graph with one input, whose first dimension is the batch.
        inputs: (N, ...) images as the graph takes them.
        tensors: names of float32 tensors that nodes of the graph compute or take.
        method: "minmax" takes the extremes; "percentile" leaves out the outermost values; "entropy" clips where the
            Kullback-Leibler divergence of the clipped and quantised values from the real ones is least (Migacz, "8-bit
            inference with TensorRT", GTC 2017).
        percentile: the share of values that a range holds, in percent; only of method "percentile".
        symmetric: whether the quantiser will make ranges symmetric: then a percentile is one of absolute values.

    Raises:
        ValueError: there are no images, they are not what the graph takes, an option is out of range, or an activation
            is not finite; the message names its tensor and node.
    """
    _check_options(method, percentile)
    check_inputs(model, inputs)
    extents = _extents(model, inputs, tensors)
    if method == "minmax":
        found = {name: (extent.lowest, extent.highest) for name, extent in extents.items()}
    else:
        bins = _PERCENTILE_BINS if method == "percentile" else _ENTROPY_BINS
        counts = _histograms(model, inputs, extents, bins=bins)
        read = entropy_limit if method == "entropy" else _percentile_reader(percentile, symmetric=symmetric)
        found = {name: _clipped(counts[name], extent, read) for name, extent in extents.items()}
    data = {name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in found.items()}
    return TensorsData(_METHODS[method], data)


def open_session(model: onnx.ModelProto, *, optimise: bool) -> onnxruntime.InferenceSession:
    """Open a graph on the CPU, with the machine's budget of threads.

    Args:
        model: the graph; it is not written anywhere.
        optimise: whether ONNX Runtime may fuse nodes; without, each tensor of the graph is computed as it stands there
            and freed as soon as it has been used.
    """
    options = session_options(optimise=optimise)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def batches(inputs: Inputs, *, step: int | None = None) -> Iterator[Inputs]:
    """Yield the images a few at a time: as many as `step`, or as fit in a fixed number of bytes."""
    if step is None:
        step = max(1, min(_STEP_IMAGES, _STEP_BYTES // (4 * max(1, inputs[0].size))))
    for start in range(0, len(inputs), step):
        yield inputs[start : start + step]


def check_inputs(model: onnx.ModelProto, inputs: Inputs) -> None:
    """Check that an array is a batch of what a graph takes.

    Raises:
        ValueError: it is empty, or of another type or shape.
    """
    if not len(inputs):
        raise ValueError("calibration images: expected at least one, got none; name a folder by --images")
    tensor = graph_input(model).type.tensor_type
    expected = [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim]
    fits = len(expected) == inputs.ndim and all(
        size in {None, actual} for size, actual in zip(expected[1:], inputs.shape[1:], strict=True)
    )
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    if not fits or inputs.dtype != dtype:
        shape = ("n", *("any" if size is None else str(size) for size in expected[1:]))
        raise ValueError(
            f"calibration images: expected {dtype} of shape ({', '.join(shape)}) as the graph takes them, "
            f"got {inputs.dtype} of shape {inputs.shape}; bring them to the size of the graph's input"
        )


def graph_input(model: onnx.ModelProto) -> onnx.ValueInfoProto:
    """Return the one input of a graph that is no constant."""
    constants = {tensor.name for tensor in model.graph.initializer}
    (found,) = (value for value in model.graph.input if value.name not in constants)
    return found


def _check_options(method: str, percentile: float) -> None:
    if method not in get_args(Method):
        raise ValueError(f"method: expected one of {', '.join(get_args(Method))}, got {method!r}")
    if not 50 < percentile <= 100:
        raise ValueError(f"percentile: expected a number above 50 and at most 100, such as 99.99, got {percentile}")


def _extents(model: onnx.ModelProto, inputs: Inputs, tensors: Sequence[str]) -> dict[str, _Extent]:
    """Run the graph once over the images, with the extremes and the size of each tensor as its outputs."""
    augmented = _with_reductions(model, tensors, ("ReduceMin", "ReduceMax", "Size"))
    answers = [output.name for output in model.graph.output]
    measured = [output.name for output in augmented.graph.output]
    session = open_session(augmented, optimise=False)
    extents = {name: _Extent() for name in tensors}
    for batch in batches(inputs):
        values = dict(zip(measured, session.run(measured, {session.get_inputs()[0].name: batch}), strict=True))
        for name, extent in extents.items():
            lowest, highest = values[f"{name}/ReduceMin"], values[f"{name}/ReduceMax"]
            extent.lowest = min(extent.lowest, float(lowest))
            extent.highest = max(extent.highest, float(highest))
            extent.values_per_image = max(extent.values_per_image, math.ceil(values[f"{name}/Size"] / len(batch)))
        # Minima and maxima leave out NaN, which nearly always goes on to the answers.
        finite = [np.isfinite(values[name]).all() for name in answers]
        if not all((*finite, *(math.isfinite(extent.limit) for extent in extents.values()))):
            raise _not_finite(model, batch)
    return extents


def _with_reductions(model: onnx.ModelProto, tensors: Sequence[str], operators: Sequence[str]) -> onnx.ModelProto:
    """Return the graph with outputs `tensor/operator`, each computed as soon as its tensor is there."""
    wanted = set(tensors)
    augmented = onnx.ModelProto()
    augmented.CopyFrom(model)
    graph = augmented.graph
    del graph.node[:]
    for value in graph.input:
        graph.node.extend(_reductions(value.name, operators) if value.name in wanted else ())
    for node in model.graph.node:
        graph.node.append(node)
        for name in wanted.intersection(node.output):
            graph.node.extend(_reductions(name, operators))
    for name in tensors:
        for operator in operators:
            kind = TensorProto.INT64 if operator == "Size" else TensorProto.FLOAT
            graph.output.append(helper.make_tensor_value_info(f"{name}/{operator}", kind, []))
    return augmented


def _reductions(name: str, operators: Sequence[str]) -> list[onnx.NodeProto]:
    return [_reduction(name, operator) for operator in operators]


def _reduction(name: str, operator: str) -> onnx.NodeProto:
    node = helper.make_node(operator, [name], [f"{name}/{operator}"], name=f"{name}/{operator}")
    if operator != "Size":
        node.attribute.append(helper.make_attribute("keepdims", 0))
    return node


def _not_finite(model: onnx.ModelProto, batch: Inputs) -> ValueError:
    """Find the first node of the graph that answers with something that is not finite."""
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)}
    made = {name: node for node in model.graph.node for name in node.output if types.get(name) == TensorProto.FLOAT}
    augmented = _with_reductions(model, list(made), ("ReduceSum",))
    session = open_session(augmented, optimise=False)
    sums = session.run([f"{name}/ReduceSum" for name in made], {session.get_inputs()[0].name: batch})
    for (tensor, node), total in zip(made.items(), sums, strict=True):
        if not np.isfinite(total):
            return ValueError(
                f"node {node.name!r} ({node.op_type}): expected finite activations, got {total} in its output "
                f"{tensor!r} on the calibration images; check the model's weights and the images' range"
            )
    return ValueError("calibration images: expected finite values, got others; check the images")


def _histograms(
    model: onnx.ModelProto, inputs: Inputs, extents: Mapping[str, _Extent], *, bins: int
) -> dict[str, Int64[np.ndarray, " bins"]]:
    """Count each tensor's values in bins of one width, from -limit to limit, group after group of tensors."""
    counts = {name: np.zeros(bins, dtype=np.int64) for name in extents}
    for group in _groups(extents):
        fetched = onnx.ModelProto()
        fetched.CopyFrom(model)
        del fetched.graph.output[:]
        fetched.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in group)
        session = open_session(fetched, optimise=False)
        held = sum(4 * extents[name].values_per_image for name in group)
        step = max(1, min(_STEP_IMAGES, _HELD_BYTES // held))
        for batch in batches(inputs, step=step):
            values = session.run(group, {session.get_inputs()[0].name: batch})
            for name, array in zip(group, values, strict=True):
                count_values(array.reshape(-1), counts[name], limit=extents[name].limit)
    return counts


def _groups(extents: Mapping[str, _Extent]) -> list[list[str]]:
    """Divide the tensors so that one image's values of a group fit into the bytes that may be held."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, extent in extents.items():
        size = 4 * extent.values_per_image
        if groups[-1] and held + size > _HELD_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def count_values(values: Float32[np.ndarray, " n"], counts: Int64[np.ndarray, " bins"], *, limit: float) -> None:
    """Add values in [-limit, limit] to the counts of bins of one width."""
    bins = len(counts)
    if limit < _NOTHING:
        counts[bins // 2] += len(values)
        return
    scale = np.float32(bins / (2 * limit))
    for start in range(0, len(values), _CHUNK_VALUES):
        places = (values[start : start + _CHUNK_VALUES] * scale + np.float32(bins / 2)).astype(np.int64)
        np.clip(places, 0, bins - 1, out=places)
        counts += np.bincount(places, minlength=bins)


def _clipped(
    counts: Int64[np.ndarray, " bins"],
    extent: _Extent,
    read: Callable[[Int64[np.ndarray, " bins"]], tuple[float, float]],
) -> tuple[float, float]:
    """Return a range read off a histogram, and never wider than the values are."""
    low, high = (share * extent.limit for share in read(counts))
    return max(low, extent.lowest), min(high, extent.highest)


def _percentile_reader(
    percentile: float, *, symmetric: bool
) -> Callable[[Int64[np.ndarray, " bins"]], tuple[float, float]]:
    def read(counts: Int64[np.ndarray, " bins"]) -> tuple[float, float]:
        return percentile_limits(counts, percentile=percentile, symmetric=symmetric)

    return read


def percentile_limits(counts: Int64[np.ndarray, " bins"], *, percentile: float, symmetric: bool) -> tuple[float, float]:
    """Return the range that holds a share of the values, as shares of the histogram's limit.

    Args:
        counts: of an odd number of bins of one width, from -limit to limit.
        percentile: in percent: of absolute values, or with as much left out below the range as above.
        symmetric: which of the two.
    """
    bins = len(counts)
    edges = np.linspace(-1, 1, bins + 1)
    if symmetric:
        middle = bins // 2
        absolute = counts[middle:].copy()
        absolute[1:] += counts[:middle][::-1]
        high = float(edges[middle + 1 + _first_above(absolute, percentile / 100)])
        return -high, high
    outside = (100 - percentile) / 200
    return float(edges[_first_above(counts, outside)]), float(edges[_first_above(counts, 1 - outside) + 1])


def _first_above(counts: Int64[np.ndarray, " bins"], share: float) -> int:
    """Return the bin in which this share of the values is reached."""
    return int(np.searchsorted(np.cumsum(counts) / counts.sum(), share))


def entropy_limit(counts: Int64[np.ndarray, " bins"]) -> tuple[float, float]:
    """Return the range whose clipped and quantised values differ least from the real ones, as shares of the limit.

    Args:
        counts: of an odd number of bins of one width, from -limit to limit.
    """
    bins = len(counts)
    middle, smallest = bins // 2, _LEVELS // 2
    divergences = [_divergence(counts, middle - half, middle + half + 1) for half in range(smallest, middle + 1)]
    half = smallest + int(np.argmin(divergences))
    limit = (2 * half + 1) / bins
    return -limit, limit


def _divergence(counts: Int64[np.ndarray, " bins"], start: int, end: int) -> float:
    """Return the Kullback-Leibler divergence of quantised from clipped values, infinite where there are none."""
    inside = counts[start:end]
    clipped = inside.copy()
    clipped[0] += counts[:start].sum()
    clipped[-1] += counts[end:].sum()
    quantised = _quantised(inside, clipped != 0)
    p, q = _smoothed(clipped), _smoothed(quantised)
    if p is None or q is None:
        return math.inf
    return float(np.sum(p * np.log(p / q)))


def _quantised(inside: Int64[np.ndarray, " n"], occupied: np.ndarray[Any, Any]) -> Float32[np.ndarray, " n"]:
    """Merge bins into levels, and share each level's count equally among its bins that are not empty."""
    width = len(inside) // _LEVELS
    level = np.minimum(np.arange(len(inside)) // width, _LEVELS - 1)
    totals = np.bincount(level, weights=inside, minlength=_LEVELS)
    members = np.bincount(level, weights=occupied, minlength=_LEVELS)
    shares = np.divide(totals, members, out=np.zeros(_LEVELS), where=members != 0)
    return np.asarray(shares[level] * occupied, dtype=np.float32)


def _smoothed(counts: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
    """Return probabilities with a little taken from the bins that have something for those that have nothing."""
    empty = counts == 0
    if empty.all():
        return None
    total = counts.sum()
    smoothed = np.where(empty, _SMOOTHING, counts * (1 - _SMOOTHING * empty.sum() / total))
    return np.asarray(smoothed / total)
