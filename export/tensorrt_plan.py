"""ONNX -> TensorRT plan, by `tensorrt` or by `tensorrt_rtx` (which also builds on a machine without a GPU).

onnx.checker --> parser --> strongly typed network + one optimisation profile --> serialised plan
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx

from export.engines.base import CannotRunHere
from export.engines.trt import collecting_logger, import_runtime

if TYPE_CHECKING:
    from pathlib import Path

    from export.manifest import TensorSpec


def plan_from_onnx(source: Path, path: Path, *, runtime: str, image: TensorSpec, max_batch: int) -> dict[str, str]:
    """Build a plan for batches of 1 to `max_batch` and write it.

    Args:
        source: the ONNX file; its own types are the plan's (TensorRT 11 is strongly typed).
        path: the file to write.
        runtime: "tensorrt" or "tensorrt_rtx".
        image: the graph's image input.
        max_batch: the largest batch of the optimisation profile.

    Returns:
        What the build was made with, for the manifest.

    Raises:
        CannotRunHere: the runtime is not installed, or cannot start here.
        ValueError: the parser or the builder refused the graph; the message has their reason.
    """
    trt = import_runtime(runtime)
    # The parser accepts even an empty file; the checker does not.
    onnx.checker.check_model(onnx.load(source))
    logger = collecting_logger(trt)
    try:
        builder = trt.Builder(logger)
    except TypeError as error:
        # What the bindings make of a constructor that returned null.
        raise CannotRunHere(f"{runtime} cannot build here: {'; '.join(logger.errors) or error}") from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(source.read_bytes()):
        raise ValueError(f"{source}: {runtime} cannot take it: {_parser_errors(parser)}")
    config = builder.create_builder_config()
    # TensorFloat-32 rounds fp32 products to 10 bits: fast, but no longer what the source computes.
    config.clear_flag(trt.BuilderFlag.TF32)
    config.add_optimization_profile(_profile(builder, image, max_batch))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ValueError(f"{source}: {runtime} could not build a plan: {'; '.join(logger.errors) or 'no reason given'}")
    path.write_bytes(bytes(plan))
    return {"runtime_version": trt.__version__, "profile": f"1..{max_batch}", "tf32": "off"}


def _profile(builder: Any, image: TensorSpec, max_batch: int) -> Any:
    profile = builder.create_optimization_profile()
    rest = image.shape[1:]
    profile.set_shape(image.name, (1, *rest), (max_batch, *rest), (max_batch, *rest))
    return profile


def _parser_errors(parser: Any) -> str:
    errors = (parser.get_error(index) for index in range(parser.num_errors))
    return "; ".join(f"{error.node_operator()} {error.node_name()!r}: {error.desc()}" for error in errors)
