"""A typed client of the service, and of every other server that speaks the Open Inference Protocol.

images --as the model takes them, batches--> ModelInfer --> logits
a status --> again, where that is safe --> the error of `service.errors` that it stands for

`Client` is for threads, `AsyncClient` for an event loop; what they ask and how they read the answers is written once
(`operations`). Importable beside tritonclient: the messages have a descriptor pool of their own.
"""

from service.client.asynchronous import AsyncClient
from service.client.blocking import Client
from service.client.connection import Tls
from service.client.description import (
    Duration,
    IndexEntry,
    ModelMetadata,
    ModelStatistics,
    Prediction,
    ServerMetadata,
    TensorMetadata,
)
from service.client.encoding import RequestOptions
from service.client.operations import DEFAULT_TIMEOUT_S as DEFAULT_TIMEOUT
from service.client.retries import NO_RETRIES, Retries

__all__ = [
    "DEFAULT_TIMEOUT",
    "NO_RETRIES",
    "AsyncClient",
    "Client",
    "Duration",
    "IndexEntry",
    "ModelMetadata",
    "ModelStatistics",
    "Prediction",
    "RequestOptions",
    "Retries",
    "ServerMetadata",
    "TensorMetadata",
    "Tls",
]
