"""BentoML: HTTP, adaptive batching.

Images come as base64 in JSON: its server takes no plain bytes into a batch, and lists of numbers cost far more.
"""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path

import bentoml
import numpy as np
from session import open_session


@bentoml.service(workers=1, traffic={"timeout": 60}, metrics={"enabled": False})
class Classifier:
    """An ONNX file; in a process of its own, which has the environment and not the arguments."""

    def __init__(self) -> None:
        self.session = open_session(os.environ["MODEL"], int(os.environ["THREADS"]))
        self.shape = tuple(int(size) for size in os.environ["SHAPE"].split(","))

    @bentoml.api(batchable=True, max_batch_size=32, max_latency_ms=1000)
    def classify(self, images: list[str]) -> np.ndarray:
        """Answer a batch."""
        pixels = np.frombuffer(b"".join(map(base64.b64decode, images)), np.float32)
        return self.session.run(None, {"images": pixels.reshape(-1, *self.shape)})[0]


if __name__ == "__main__":
    model, port, threads, shape = sys.argv[1:]
    environment = {"MODEL": model, "THREADS": threads, "SHAPE": shape, "BENTOML_DO_NOT_TRACK": "1"}
    program = Path(sys.executable).with_name("bentoml")
    service = f"{Path(__file__).stem}:Classifier"
    os.chdir(Path(__file__).parent)
    os.execve(program, [program, "serve", service, "--port", port, "--host", "127.0.0.1"], os.environ | environment)
