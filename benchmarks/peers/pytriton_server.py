"""Triton with its Python backend: gRPC, dynamic batching."""

from __future__ import annotations

import os
import signal
import sys
import sysconfig

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig
from session import open_session

MODEL, PORT, THREADS, SHAPE = sys.argv[1:]


def main() -> None:
    """Serve until the process is ended."""
    # The backend loads whichever libpython of this version comes first, and fails with another one than this one.
    os.environ["LD_LIBRARY_PATH"] = sysconfig.get_config_var("LIBDIR")
    # Left to end by itself, it leaves its processes and shared memory behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    session = open_session(MODEL, int(THREADS))

    @batch
    def classify(images):
        return session.run(None, {"images": images})

    ports = {"grpc_port": int(PORT), "http_port": int(PORT) + 1, "metrics_port": int(PORT) + 2}
    with Triton(config=TritonConfig(log_verbose=0, **ports)) as triton:
        triton.bind(
            model_name="model",
            infer_func=classify,
            inputs=[Tensor(name="images", dtype=np.float32, shape=tuple(int(size) for size in SHAPE.split(",")))],
            outputs=[Tensor(name="logits", dtype=np.float32, shape=(-1,))],
            config=ModelConfig(max_batch_size=32, batcher=DynamicBatcher(max_queue_delay_microseconds=0)),
        )
        triton.serve()


if __name__ == "__main__":
    main()
