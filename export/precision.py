"""ONNX fp32 -> ONNX int8, calibrated on real images.

fp32 graph --fold, infer shapes--> prepared --min-max over images--> QDQ graph, U8 activations, S8 weights
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

if TYPE_CHECKING:
    from collections.abc import Iterator

    from export.engines.base import Images

# Images a calibration step: enough to keep both cores busy, small enough for any memory.
_BATCH = 32


def int8_from_onnx(source: Path, path: Path, *, images: Images, input_name: str) -> None:
    """Write the int8 version of an ONNX file, for CPUs: U8 activations, S8 weights, per channel.

    On CPUs with VNNI this form is the fast one; S8 activations are slower there than fp32.

    Args:
        source: the fp32 file.
        path: the file to write.
        images: (N, C, H, W) float32 in [0, 1], from the training data: activation ranges come from them.
        input_name: the graph's image input.

    Raises:
        ValueError: there are no images.
    """
    if not len(images):
        raise ValueError(
            "int8 needs images for calibration: expected at least one, got none; name a folder by --images"
        )
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        # onnxruntime's quantiser calls deprecated parts of onnx.
        warnings.simplefilter("ignore")
        prepared = Path(scratch) / "prepared.onnx"
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(path),
            _ImageReader(images, input_name=input_name),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            nodes_to_exclude=_ends(prepared),
        )


def _ends(path: Path) -> list[str]:
    """Return the first convolution and the last matrix product: they stay in fp32.

    The first sees the pixels, the last makes the logits, and neither costs much. On three digit classifiers, quantising
    these two as well made top-1 differ from fp32 on 1.2, 9.3 and 2.2 % of 504 images; without them, on 0.0, 0.0 and
    0.2 % (benchmarks/int8_ends.py).
    """
    nodes = onnx.load(path).graph.node
    convolutions = [node.name for node in nodes if node.op_type == "Conv"]
    products = [node.name for node in nodes if node.op_type in {"Gemm", "MatMul"}]
    return [*convolutions[:1], *products[-1:]]


class _ImageReader(CalibrationDataReader):  # type: ignore[misc]
    """Hands the calibrator one batch after another."""

    def __init__(self, images: Images, *, input_name: str) -> None:
        self._batches = self._feeds(images, input_name)

    @staticmethod
    def _feeds(images: Images, input_name: str) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        for start in range(0, len(images), _BATCH):
            yield {input_name: images[start : start + _BATCH]}

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        """Return the next feed, None after the last (ONNX Runtime's interface)."""
        return next(self._batches, None)
