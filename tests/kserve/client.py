"""KServe's own client, run by the interpreter of its own environment: client.py HOST:PORT MODEL -> JSON of what it saw.

Its messages have the names of Triton's and ours, so it cannot be imported where those are.
"""

from __future__ import annotations

import asyncio
import json
import sys

import grpc
import numpy as np
from kserve import InferenceGRPCClient, InferInput, InferRequest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub


async def main(server: str, model: str) -> None:
    """Ask everything that the client can, and print it."""
    images = np.random.default_rng(1).random((3, 3, 4, 4), dtype=np.float32)
    seen: dict[str, object] = {}
    async with InferenceGRPCClient(server) as client:
        seen["live"] = await client.is_server_live()
        seen["ready"] = await client.is_server_ready()
        seen["model ready"] = await client.is_model_ready(model)
        for form in ("raw", "typed"):
            tensor = InferInput("images", list(images.shape), "FP32")
            tensor.set_data_from_numpy(images, binary_data=form == "raw")
            response = await client.infer(InferRequest(model, [tensor], request_id="seven"))
            seen[form] = {"id": response.id, "answer": response.outputs[0].as_numpy().tolist()}
    async with grpc.aio.insecure_channel(server) as channel:
        stub = GRPCInferenceServiceStub(channel)
        metadata = await stub.ModelMetadata(pb.ModelMetadataRequest(name=model))
        seen["inputs"] = [[each.name, each.datatype, list(each.shape)] for each in metadata.inputs]
        unloaded = await stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name=model))
        seen["unloaded"] = [unloaded.model_name, unloaded.isUnloaded]
        seen["ready after that"] = (await stub.ModelReady(pb.ModelReadyRequest(name=model))).ready
        loaded = await stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=model))
        seen["loaded"] = [loaded.model_name, loaded.isLoaded]
    print(json.dumps(seen))  # noqa: T201 - for the test


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
