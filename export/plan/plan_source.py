"""The ONNX file that a plan is built from: checked before TensorRT's parser sees it, and what that parser refuses.

ONNX file --onnx.checker, shapes--> TensorRT's parser --> network | the operator and the node that it cannot take
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import onnx
from google.protobuf.message import DecodeError

from export.engines.messages import logger

if TYPE_CHECKING:
    from pathlib import Path

    from export.manifest import TensorSpec

SERVE_ONNX = "serve the ONNX model by onnxruntime, or change the network"


def check(source: Path, image: TensorSpec) -> None:
    """Refuse what is no ONNX model, which the parser would accept, and inputs that no profile fits."""
    try:
        onnx.checker.check_model(source)
    except (onnx.checker.ValidationError, DecodeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{source}: expected an ONNX model, got something else: {reason}; export it again") from error
    if image.shape[0] != -1 or min(image.shape[1:], default=0) < 1:
        raise ValueError(
            f"input {image.name!r}: expected a batch of any size and a fixed size of the images, got {image.shape}; "
            "export the model with a dynamic batch"
        )


def parse(trt: Any, network: Any, source: Path, *, runtime: str) -> None:
    """Fill a network from the file.

    Raises:
        ValueError: the parser cannot take it; the message names the operator and the node.
    """
    parser = trt.OnnxParser(network, logger(trt))
    if parser.parse(source.read_bytes(), str(source)):
        return
    refused = [_refusal(parser.get_error(index)) for index in range(parser.num_errors)]
    raise ValueError(f"{source}: {runtime} cannot take it: {'; '.join(refused)}; {SERVE_ONNX}")


def _refusal(error: Any) -> str:
    node = f"operator {error.node_operator()}, node {error.node_name()!r} (number {error.node()})"
    return f"{node}: {_reason(error.code().name, error.desc().strip())}"


def _reason(code: str, description: str) -> str:
    """Say why a node was refused, without the lines of TensorRT's own source."""
    kind = code.lower().replace("_", " ")
    if "UInt8" in description:
        return f"{kind}: uint8 must go through a Cast to float before anything else"
    if "Plugin not found" in description:
        return f"{kind}: TensorRT has no such operator"
    if details := re.search(r"API Usage Error \((.*?)(?:\. In \w+ at |\)$)", description, re.DOTALL):
        return f"{kind}: {details[1]}"
    first = description.partition("\n")[0]
    # Where a condition of its own failed, the parser cites that condition, in C++: "false", say.
    return kind if first in {"", "false"} or "&&" in first else f"{kind}: {first}"
