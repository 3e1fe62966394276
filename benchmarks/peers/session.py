"""What every peer runs: ONNX Runtime with the options that our own server gives it."""

from __future__ import annotations

import onnxruntime as ort


def open_session(path: str, threads: int) -> ort.InferenceSession:
    """Open a file on the CPU."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
