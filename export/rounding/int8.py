"""fp32 graph -> int8 graph: one calibration, from which graphs are made that keep these or those layers in fp32.

ONNX file --preparation, calibration over images--> Quantiser --graph(kept=...)--> QDQ graph for CPUs | for TensorRT
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from onnxruntime.quantization import QuantType
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import add_infer_metadata

from export.graph import preparation
from export.manifest import Target
from export.rounding import calibration

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    import onnx
    from onnxruntime.quantization.calibrate import TensorsData

    from export.graph.preparation import Prepared
    from export.manifest import Method
    from export.rounding.calibration import Inputs

# Operators that compute with 8-bit integers in ONNX Runtime's CPU provider. Its quantiser would take others as well,
# LayerNormalization for one, which then lose precision and gain nothing: there are no integer kernels for them.
_CPU_COMPUTE = frozenset(
    {
        "Add", "AveragePool", "Concat", "Conv", "Gemm", "GlobalAveragePool", "LeakyRelu", "MatMul", "Mul", "Sigmoid",
        "Softmax",
    }
)  # fmt: skip

# Operators that hand 8-bit integers on: their values are rounded by those around them.
_CPU_PASS = frozenset(
    {
        "Clip", "Flatten", "Gather", "MaxPool", "Pad", "Relu", "Reshape", "Resize", "Slice", "Split", "Squeeze",
        "Transpose", "Unsqueeze",
    }
)  # fmt: skip

# Of those that compute, the ones without weights. In 8 bits they spare the casts between two convolutions, and gain
# nothing elsewhere; but a residual sum in 8 bits rounds all that comes before it, layer after layer. With their sums in
# fp32 instead, int8 agreed with fp32 on 84 instead of 48 % of images for vit_b_16, and differed from it by 2.7 instead
# of 4.3 % of the logits' spread for convnext_tiny, in the same time (random weights, 80 and 240 images of 64 x 64).
_CPU_LIGHT = frozenset({"Add", "Concat", "LeakyRelu", "Mul", "Sigmoid", "Softmax"})

# TensorRT fuses what stands around these layers by itself, as long as their inputs and nothing else are quantised.
_TENSORRT_COMPUTE = frozenset({"Conv", "Gemm", "MatMul"})


@dataclass(frozen=True)
class _Form:
    """How a target wants its graph."""

    compute: frozenset[str]
    operators: frozenset[str]
    activations: Any
    options: Mapping[str, Any]
    symmetric: bool


_FORMS = {
    # S8 activations are slower than fp32 on CPUs with VNNI, this form is the fast one.
    "cpu": _Form(_CPU_COMPUTE, _CPU_COMPUTE | _CPU_PASS, QuantType.QUInt8, {}, symmetric=False),
    "tensorrt": _Form(
        _TENSORRT_COMPUTE,
        _TENSORRT_COMPUTE,
        QuantType.QInt8,
        {
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": sorted(_TENSORRT_COMPUTE),
        },
        symmetric=True,
    ),
}


@dataclass(frozen=True, eq=False)
class Quantiser:
    """A prepared graph and the ranges of its activations: int8 graphs are made from it, whatever they keep in fp32.

    Attributes:
        prepared: the graph.
        ranges: of its activations.
        target: the form of the graphs.
        ends: the first convolution and the last product, with what is before and after them: they stay in fp32.
        light: nodes without weights that would lose precision and gain nothing: they stay in fp32 as well.
    """

    prepared: Prepared
    ranges: TensorsData
    target: Target
    ends: frozenset[str]
    light: frozenset[str]

    @property
    def optimise(self) -> bool:
        """Whether the graphs to measure may be optimised: ONNX Runtime would add pairs that TensorRT does not."""
        return self.target != "tensorrt"

    def candidates(self, kept: Collection[str]) -> tuple[onnx.NodeProto, ...]:
        """Return the nodes that compute in int8, in the order of the graph: not those kept, nor the ends."""
        compute = _FORMS[self.target].compute
        left = {*self.ends, *self.light, *kept}
        return tuple(
            node for node in self.prepared.model.graph.node if node.op_type in compute and node.name not in left
        )

    def kept(self, names: Collection[str]) -> tuple[str, ...]:
        """Return the nodes that could be int8 and stay in fp32, in the order of the graph: the ends and `names`."""
        compute = _FORMS[self.target].compute
        nodes = self.prepared.model.graph.node
        return tuple(
            node.name for node in nodes if node.name in names or (node.name in self.ends and node.op_type in compute)
        )

    def graph(self, *, kept: Collection[str] = (), only: Collection[str] = ()) -> onnx.ModelProto:
        """Return the int8 graph.

        Args:
            kept: nodes of the prepared graph to keep in fp32, beside the ends.
            only: the nodes to quantise; all that are not kept by default.
        """
        form = _FORMS[self.target]
        model = self.prepared.copy()
        add_infer_metadata(model)
        ranges = type(self.ranges)(self.ranges.calibration_method, dict(self.ranges.items()))
        made = QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=form.activations,
            tensors_range=ranges,
            nodes_to_quantize=list(only),
            nodes_to_exclude=sorted({*self.ends, *self.light, *kept}),
            op_types_to_quantize=sorted(form.operators),
            extra_options=dict(form.options),
        )
        quantised = made.quantize_model()
        if form.symmetric:
            _dedicate(quantised.graph, raw={*self.ends, *kept})
        else:
            _straighten(quantised.graph, raw=self._fp32(kept, only))
        return self.prepared.finished(quantised)

    def _fp32(self, kept: Collection[str], only: Collection[str]) -> set[str]:
        """Return the nodes of a graph that compute in fp32."""
        operators, left = _FORMS[self.target].operators, {*self.ends, *self.light, *kept}
        return {
            node.name
            for node in self.prepared.model.graph.node
            if node.op_type not in operators or node.name in left or (only and node.name not in only)
        }

    def on_cpu(self, *, kept: Collection[str] = (), only: Collection[str] = ()) -> onnx.ModelProto:
        """Return the graph to measure on the CPU: the int8 graph itself."""
        return self.graph(kept=kept, only=only)


def quantiser(
    source: Path, *, inputs: Inputs, target: Target = "cpu", method: Method = "minmax", percentile: float = 99.99
) -> Quantiser:
    """Prepare a graph and measure the ranges of its activations; arguments and errors as for `int8_from_onnx`."""
    if target not in _FORMS:
        raise ValueError(f"target: expected one of {', '.join(get_args(Target))}, got {target!r}")
    prepared = preparation.prepare(source)
    form = _FORMS[target]
    ranges = calibration.ranges(
        prepared.model,
        inputs,
        tensors=prepared.activations(form.operators),
        method=method,
        percentile=percentile,
        symmetric=form.symmetric,
    )
    light = _light(prepared) if target == "cpu" else frozenset()
    return Quantiser(prepared, ranges, target, _ends(prepared), light)


def _ends(prepared: Prepared) -> frozenset[str]:
    """Return the first convolution and what is before it, the last product and what is after it: they stay in fp32.

    The first sees the pixels, the last makes the logits, and neither costs much. On three digit classifiers, quantising
    these two as well made the logits differ from those of fp32 by 0.058, 0.065 and 0.056 on average instead of 0.036,
    0.040 and 0.039 for CPUs, and by 0.053, 0.058 and 0.056 instead of 0.043, 0.051 and 0.047 for TensorRT
    (benchmarks/int8_ends.py).
    """
    layers = prepared.layers
    if not layers:
        return frozenset()
    convolutions = [node for node in layers if node.op_type == "Conv"]
    names = {node.name for node in (*convolutions[:1], layers[-1])}
    return frozenset(names | prepared.upstream(layers[0]) | prepared.downstream(layers[-1]))


def _light(prepared: Prepared) -> frozenset[str]:
    """Return the nodes without weights that stay in fp32 on CPUs: all in a transformer, else those no Conv reads."""
    nodes = prepared.model.graph.node
    light = [node for node in nodes if node.op_type in _CPU_LIGHT]
    if any(node.op_type == "LayerNormalization" for node in nodes):
        return frozenset(node.name for node in light)
    # Backwards through the graph, whose nodes are in their order: what a value goes into was seen before it.
    read = set[str]()
    for node in reversed(nodes):
        through = node.op_type in _CPU_LIGHT | _CPU_PASS and read.intersection(node.output)
        if node.op_type == "Conv" or through:
            read.update(node.input)
    return frozenset(node.name for node in light if not read.intersection(node.output))


def _straighten(graph: onnx.GraphProto, *, raw: Collection[str]) -> None:
    """Let nodes in fp32 read what other such nodes made, where a layer in int8 reads the same tensor rounded."""
    makers = {name: node for node in graph.node for name in node.output}
    exact = {
        node.output[0]: makers[node.input[0]].input[0]
        for node in graph.node
        if node.op_type == "DequantizeLinear"
        and node.input[0] in makers
        and (source := makers.get(makers[node.input[0]].input[0])) is not None
        and source.name in raw
    }
    for node in graph.node:
        if node.name in raw:
            node.input[:] = [exact.get(name, name) for name in node.input]


def _dedicate(graph: onnx.GraphProto, *, raw: Collection[str]) -> None:
    """Give each reader of a quantised tensor a pair of its own, and what stays in fp32 the tensor as it was.

    TensorRT does not share a pair: it moves each into the layer behind it.
    """
    made = {node.output[0]: node for node in graph.node}
    pairs = {
        node.output[0]: (made[node.input[0]], node)
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in made
    }
    readers = [(node, place) for node in graph.node for place, name in enumerate(node.input) if name in pairs]
    seen: dict[str, int] = {}
    for node, place in readers:
        name = node.input[place]
        quantise, dequantise = pairs[name]
        if node.name in raw:
            node.input[place] = quantise.input[0]
            continue
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            node.input[place] = _pair(graph, quantise, dequantise, number=seen[name])
    for name in pairs.keys() - seen.keys():
        for node in pairs[name]:
            graph.node.remove(node)


def _pair(graph: onnx.GraphProto, quantise: onnx.NodeProto, dequantise: onnx.NodeProto, *, number: int) -> str:
    """Add a copy of a pair and return the tensor it answers with."""
    first, second = graph.node.add(), graph.node.add()
    first.CopyFrom(quantise)
    second.CopyFrom(dequantise)
    for node in (first, second):
        node.name = f"{node.name}_{number}"
        node.output[0] = f"{node.output[0]}_{number}"
    second.input[0] = first.output[0]
    return second.output[0]
