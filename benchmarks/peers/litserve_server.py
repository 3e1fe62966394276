"""LitServe: HTTP, batches of what waits.

Images come as base64 in JSON: its server hands no plain bytes to the process that runs the model.
"""

from __future__ import annotations

import base64
import sys

import litserve
import numpy as np
from session import open_session

MODEL, PORT, THREADS, SHAPE = sys.argv[1:]


class Classifier(litserve.LitAPI):
    """An ONNX file."""

    def setup(self, device: str) -> None:
        self.session = open_session(MODEL, int(THREADS))
        self.shape = tuple(int(size) for size in SHAPE.split(","))

    def decode_request(self, request: dict):
        (image,) = request["images"]
        return np.frombuffer(base64.b64decode(image), np.float32).reshape(self.shape)

    def batch(self, inputs):
        return np.stack(inputs)

    def predict(self, images):
        return self.session.run(None, {"images": images})[0]

    def unbatch(self, output):
        return list(output)

    def encode_response(self, output) -> list:
        return output.tolist()


if __name__ == "__main__":
    api = Classifier(max_batch_size=32, batch_timeout=0.0)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(PORT), generate_client_file=False, num_api_servers=1, log_level="warning")
