"""A model behind a gRPC endpoint of the Open Inference Protocol as a target: ours, Triton's, KServe's.

images --contract: normalised, layout, type--> requests, several in flight --retries, push-back--> answers --> logits
It is asked for its metadata alone until the first image: an endpoint that is not there costs no query.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from service.audit.target import served
from service.audit.target.base import Target, TargetFailed
from service.audit.target.contract import contract
from service.client import Client, Retries, encoding, operations
from service.errors import DeadlineExceeded, ServiceError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from export.engines.base import Images, Logits
    from export.mapping import Mapping
    from service.audit.target.contract import Contract
    from service.audit.target.served import InputKind
    from service.client import Tls
    from service.client.connection import Token
    from service.client.description import ModelMetadata

# Twenty seconds and more: an audit of hours outlasts a server that starts again, or a queue that is full for a while.
_PATIENT = Retries(attempts=10)

# Seconds that a request may take, retries and all.
_TIMEOUT_S = 120.0


class Asking(Client):
    """A client that sends what a contract says."""

    def answers(
        self, images: Images, agreed: Contract, *, version: str, batch: int, in_flight: int
    ) -> Iterator[Logits]:
        """Yield the answers to images, batch by batch, while later ones are on their way."""
        calls = (
            operations.Call(
                "ModelInfer",
                encoding.with_images(
                    agreed.encoded(images[start : start + batch]),
                    agreed.described,
                    version=version,
                    options=encoding.DEFAULT_OPTIONS,
                ),
            )
            for start in range(0, len(images), batch)
        )
        for response in self._in_order(calls, in_flight=in_flight):
            yield encoding.logits_of(response)


class EndpointTarget(Target):
    """A model behind an endpoint.

    Attributes:
        server: HOST:PORT.
        contract: what it takes and gives.
        version: which is asked; "" where the server names none.
    """

    def __init__(
        self,
        server: str,
        *,
        model: str,
        version: int | str | None = None,
        labels: Sequence[str] = (),
        mapping: Mapping | None = None,
        wanted: InputKind = "auto",
        tls: Tls | None = None,
        token: Token | None = None,
        timeout_s: float = _TIMEOUT_S,
        retries: Retries = _PATIENT,
        in_flight: int = operations.DEFAULT_IN_FLIGHT,
    ) -> None:
        """Ask the server about the model, and about no image.

        Args:
            server: HOST:PORT.
            model: its name there.
            version: its number, or an alias where the server has such; by default the latest as the audit begins.
            labels: names of the classes, if the server does not tell or tells others.
            mapping: how images become the model's input, where metadata do not say.
            wanted: the plan's `target.input`.
            tls: certificates; the connection is not encrypted without them.
            token: a bearer token, or what returns one.
            timeout_s: seconds that each request may take, retries and all.
            retries: of requests with images. A retry is no query: the image is asked about once.
            in_flight: requests that are on their way at once; 1 for a server that may join them to larger batches,
                and a model whose answers depend on those.

        Raises:
            ConnectionError: nobody answers there.
            ValueError: the server does not have the model, or it is no classifier of images.
        """
        super().__init__()
        self.server = server
        described, limit = _described(server, model, version, tls=tls, token=token)
        self.contract = contract(described, mapping=mapping, labels=labels)
        self.version = _pinned(described, version)
        self.name = f"{model}@{self.version}" if self.version else model
        self.class_names = self.contract.class_names
        self.image_shape = self.contract.image_shape
        self.domain = served.domain(wanted, datatype=self.contract.datatype, model=self.name)
        self.batch_sizes = _batch_sizes(self.contract, limit)
        self._in_flight = in_flight
        self._client = Asking(server, timeout=timeout_s, tls=tls, token=token, retries=retries)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _answer(self, images: Images) -> Logits:
        asking = self._client.answers(
            images, self.contract, version=self.version, batch=self.max_batch, in_flight=self._in_flight
        )
        try:
            # ValueError: of answers that are no table of float32, or not the same one for all requests.
            answers = np.concatenate([np.empty((0, len(self.class_names)), np.float32), *asking])
        except (ServiceError, ValueError) as error:
            raise TargetFailed(f"{self.name}: {error}") from error
        return served.as_logits(answers, probabilities=self.contract.probabilities)


def _described(
    server: str, model: str, version: int | str | None, *, tls: Tls | None, token: Token | None
) -> tuple[ModelMetadata, int | None]:
    """Return the model's metadata, and the images that a request may have, None if nobody says."""
    # The client's own retries: a person who mistyped an address does not wait long.
    with Client(server, tls=tls, token=token) as client:
        try:
            described = client.metadata(model, version=version)
        except (Unavailable, DeadlineExceeded) as error:
            raise ConnectionError(f"target.endpoint: {server}, model {model!r}: {error}") from error
        except ServiceError as error:
            raise ValueError(f"target.endpoint: {server}, model {model!r}: {error}") from error
        if (limit := described.properties.get("max_batch_size", "")).isdigit():
            return described, int(limit)
        try:
            return described, client.config(model, version=version).max_batch_size or None
        except ServiceError:
            return described, None  # an extension of the protocol, which a server may leave out


def _pinned(described: ModelMetadata, version: int | str | None) -> str:
    """Return the version that was described: the latest may be another before the audit has ended."""
    if pinned := operations.pinned_version(described, version):
        return pinned
    numbers = [int(each) for each in described.versions if each.isdigit()]
    return str(max(numbers)) if numbers else ""


def _batch_sizes(agreed: Contract, limit: int | None) -> tuple[int, ...]:
    if agreed.fixed_batch is not None:
        if agreed.fixed_batch > 1:
            raise ValueError(
                f"{agreed.described.name}: expected a model that takes any number of images, got one that takes "
                f"{agreed.fixed_batch} at a time; serve it with a dynamic batch"
            )
        return (1,)
    image = agreed.encoded(np.zeros((1, *agreed.image_shape), np.float32))
    # As the client cuts them: no more bytes a request than servers take, and few enough images to be fair to others.
    most = encoding.batch_size(agreed.described, image)
    return served.batch_sizes(most if limit is None else max(1, min(most, limit)))
