"""MLServer: gRPC, adaptive batching, in one process."""

from __future__ import annotations

import asyncio
import sys

from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from session import open_session

MODEL, PORT, THREADS, _ = sys.argv[1:]


class Classifier(MLModel):
    """An ONNX file."""

    async def load(self) -> bool:
        self.session = open_session(MODEL, int(THREADS))
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        images = NumpyCodec.decode_input(payload.inputs[0])
        (logits,) = self.session.run(None, {"images": images})
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("logits", logits)])


async def main() -> None:
    """Serve until the process is ended."""
    settings = Settings(
        grpc_port=int(PORT),
        http_port=int(PORT) + 1,
        metrics_endpoint=None,
        parallel_workers=0,
        debug=False,
        load_models_at_startup=False,
    )
    # 0 would turn batching off; a tenth of a millisecond is the least that it waits.
    model = ModelSettings(name="model", implementation=Classifier, max_batch_size=32, max_batch_time=0.0001)
    await MLServer(settings).start([model])


if __name__ == "__main__":
    asyncio.run(main())
