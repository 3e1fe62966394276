"""What a server says of itself and its models: the protocol's messages -> frozen values."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from export.engines.base import Logits
    from protos.inference import open_inference_pb2 as pb


@dataclass(frozen=True)
class TensorMetadata:
    """A tensor of a model: its name, protocol datatype, and shape with -1 for any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Prediction:
    """One class that a model gives an image, and how probable it says that is, in [0, 1]."""

    name: str
    index: int
    probability: float


@dataclass(frozen=True)
class ModelMetadata:
    """A model as its server describes it; other servers than ours may give no properties."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]
    properties: dict[str, str]

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the logits; empty if the server does not tell."""
        return tuple(json.loads(self.properties.get("class_names", "[]")))

    @property
    def aliases(self) -> tuple[str, ...]:
        """The aliases that point at this version; empty if there are none, or the server does not tell."""
        return tuple(json.loads(self.properties.get("aliases", "[]")))

    @property
    def channels_last(self) -> bool:
        """Whether the model takes images as they are stored, uint8 NHWC; otherwise float32 NCHW in [0, 1]."""
        return self.inputs[0].datatype == "UINT8"

    @property
    def takes_encoded_images(self) -> bool:
        """Whether the server decodes and resizes images that it is sent as JPEG, PNG or WebP."""
        return bool(self.properties.get("encoded_images"))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image, whatever order the model takes it in; -1 for any size."""
        if self.channels_last:
            _, height, width, channels = self.inputs[0].shape
        else:
            _, channels, height, width = self.inputs[0].shape
        return channels, height, width

    @property
    def answers_probabilities(self) -> bool:
        """Whether the model applies softmax itself; a server that does not tell is judged by its output's name."""
        return self.properties.get("output", self.outputs[0].name) == "probabilities"

    def probabilities(self, answers: Logits) -> Logits:
        """Return the probabilities of the classes, (N, classes), rows of sum 1.

        Args:
            answers: (N, classes), as the model answered: logits, to which softmax is applied, or probabilities.
        """
        if self.answers_probabilities:
            return answers
        shares = np.exp(answers - answers.max(axis=1, keepdims=True))
        return np.asarray(shares / shares.sum(axis=1, keepdims=True))

    def predictions(self, answers: Logits, *, top: int = 1) -> list[list[Prediction]]:
        """Return the most probable classes of each image, the first first; classes without a name have their index.

        Args:
            answers: (N, classes), as the model answered.
            top: how many classes an image, at least 1; all, where the model has fewer.
        """
        if top < 1:
            raise ValueError(f"top: expected at least 1 class an image, got {top}")
        shares = self.probabilities(answers)
        names = self.class_names or tuple(map(str, range(shares.shape[1])))
        # A stable sort: of equals the first class wins, as argmax has it.
        orders = np.argsort(-shares, axis=1, kind="stable")[:, :top]
        return [
            [Prediction(names[index], int(index), float(row[index])) for index in order]
            for row, order in zip(shares, orders, strict=True)
        ]


@dataclass(frozen=True)
class ServerMetadata:
    """A server as it describes itself: what it is, and the extensions of the protocol that it speaks."""

    name: str
    version: str
    extensions: tuple[str, ...]


@dataclass(frozen=True)
class IndexEntry:
    """One version in a server's repository: READY, LOADING, UNLOADING, UNAVAILABLE or UNKNOWN, and why."""

    name: str
    version: str
    state: str
    reason: str


@dataclass(frozen=True)
class Duration:
    """How often something was done, and the nanoseconds that it took all together."""

    count: int
    ns: int

    @property
    def mean_ms(self) -> float | None:
        """Milliseconds it took each time; None if it was never done."""
        return self.ns / self.count / 1e6 if self.count else None


@dataclass(frozen=True)
class ModelStatistics:
    """What one version has done since the server first served it, over reloads.

    Attributes:
        images: images that were answered.
        executions: calls of the engine.
        succeeded: requests that were answered, from arrival to answer; `failed`: those that were not.
        queue: requests' time in the queue; `compute`: theirs in the engine, before it and after it.
        cache_hit: requests that the response cache answered; `cache_miss`: those that it could not.
    """

    name: str
    version: str
    images: int
    executions: int
    succeeded: Duration
    failed: Duration
    queue: Duration
    compute: Duration
    cache_hit: Duration
    cache_miss: Duration

    @property
    def requests(self) -> int:
        """Requests that were answered, well or not."""
        return self.succeeded.count + self.failed.count

    @property
    def mean_batch(self) -> float | None:
        """Images a call of the engine; None if there was none."""
        return self.images / self.executions if self.executions else None


def model_metadata(message: pb.ModelMetadataResponse) -> ModelMetadata:
    """Return what a message says."""
    return ModelMetadata(
        name=message.name,
        versions=tuple(message.versions),
        platform=message.platform,
        inputs=tuple(TensorMetadata(each.name, each.datatype, tuple(each.shape)) for each in message.inputs),
        outputs=tuple(TensorMetadata(each.name, each.datatype, tuple(each.shape)) for each in message.outputs),
        properties=dict(message.properties),
    )


def model_statistics(message: pb.ModelStatistics) -> ModelStatistics:
    """Return what a message says."""
    parts = message.inference_stats
    computing = (parts.compute_input, parts.compute_infer, parts.compute_output)
    return ModelStatistics(
        name=message.name,
        version=message.version,
        images=message.inference_count,
        executions=message.execution_count,
        succeeded=_duration(parts.success),
        failed=_duration(parts.fail),
        queue=_duration(parts.queue),
        compute=Duration(parts.compute_infer.count, sum(part.ns for part in computing)),
        cache_hit=_duration(parts.cache_hit),
        cache_miss=_duration(parts.cache_miss),
    )


def _duration(message: pb.StatisticDuration) -> Duration:
    return Duration(message.count, message.ns)
