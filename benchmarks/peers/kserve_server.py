"""KServe's Python server: gRPC, no batching."""

from __future__ import annotations

import sys

import kserve
from session import open_session

MODEL, PORT, THREADS, _ = sys.argv[1:]


class Classifier(kserve.Model):
    """An ONNX file."""

    def __init__(self) -> None:
        super().__init__("model")
        self.session = open_session(MODEL, int(THREADS))
        self.ready = True

    def predict(self, payload, headers=None, response_headers=None):
        (logits,) = self.session.run(None, {"images": payload.inputs[0].as_numpy()})
        output = kserve.InferOutput("logits", list(logits.shape), "FP32")
        output.set_data_from_numpy(logits, binary_data=True)
        return kserve.InferResponse(payload.id, "model", [output])


if __name__ == "__main__":
    # Its server reads the command line, too.
    sys.argv[1:] = []
    server = kserve.ModelServer(grpc_port=int(PORT), http_port=int(PORT) + 1, workers=1, enable_docs_url=False)
    server.start([Classifier()])
