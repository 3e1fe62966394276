"""Mosec: a front in Rust, HTTP, dynamic batching."""

from __future__ import annotations

import os
import sys

import numpy as np
from mosec import Server, Worker
from session import open_session


class Classifier(Worker):
    """An ONNX file; in a process of its own, which has this one's environment and not its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.session = open_session(os.environ["MODEL"], int(os.environ["THREADS"]))
        self.shape = tuple(int(size) for size in os.environ["SHAPE"].split(","))

    def deserialize(self, data: bytes):
        return np.frombuffer(data, np.float32).reshape(self.shape)

    def serialize(self, data) -> bytes:
        return data.tobytes()

    def forward(self, data):
        return list(self.session.run(None, {"images": np.stack(data)})[0])


if __name__ == "__main__":
    model, port, threads, shape = sys.argv[1:]
    os.environ |= {"MODEL": model, "THREADS": threads, "SHAPE": shape}
    sys.argv[1:] = ["--port", port, "--address", "127.0.0.1"]
    server = Server()
    # Milliseconds, the least: 0 stands for its default, which is 10.
    server.append_worker(Classifier, num=1, max_batch_size=32, max_wait_time=1)
    server.run()
