"""Checkpoint -> ONNX graph: named dynamic batch, normalisation inside, nothing of this machine in the file."""

from __future__ import annotations

import json
import logging
import warnings
from typing import TYPE_CHECKING

import onnx
import torch

from export.manifest import TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

INPUT = "images"
OUTPUT = "logits"

# The newest opset that both ONNX Runtime and TensorRT's parser take in full.
OPSET = 20


def onnx_from_module(
    module: nn.Module, path: Path, *, image_shape: tuple[int, int, int], class_names: tuple[str, ...]
) -> None:
    """Write a classifier as an ONNX file.

    Args:
        module: (N, C, H, W) float32 in [0, 1] -> (N, classes) logits, in eval mode.
        path: the file to write.
        image_shape: (C, H, W).
        class_names: stored as JSON in the file's metadata under "class_names".

    Raises:
        ValueError: the module cannot be exported; the message has the exporter's reason.
    """
    assert not module.training, "a module is exported in eval mode"
    # A batch of one would be specialised: the exporter takes a size of 1 for a constant.
    example = torch.zeros(2, *image_shape)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # The exporter trips over deprecations inside torch itself.
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the model cannot be exported to ONNX: {reason}") from error
    assert program is not None
    graph = without_traces(program.model_proto)
    graph.metadata_props.add(key="class_names", value=json.dumps(class_names))
    onnx.checker.check_model(graph, full_check=True)
    path.write_bytes(graph.SerializeToString(deterministic=True))


def without_traces(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Strip the exporter's notes: they hold stack traces with this machine's paths."""
    for value in (*graph.graph.input, *graph.graph.output, *graph.graph.value_info):
        del value.metadata_props[:]
    for tensor in graph.graph.initializer:
        del tensor.metadata_props[:]
    for node in graph.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del graph.graph.metadata_props[:]
    del graph.metadata_props[:]
    graph.doc_string = ""
    return graph


def specs(path: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return the inputs and outputs of an ONNX file, -1 for every named dimension."""
    graph = onnx.load(path).graph
    return tuple(map(_spec, graph.input)), tuple(map(_spec, graph.output))


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    assert tensor.elem_type == onnx.TensorProto.FLOAT, "our own graphs take and give float32"
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim)
    return TensorSpec(name=value.name, datatype="FP32", shape=shape)
