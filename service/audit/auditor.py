"""The work of an audit, cut into shards whose results depend on the plan alone.

    plan --shards--> [clean | attack x slice | corruption x severity] --Auditor.run--> ShardResult (JSON)

Boundaries are fixed by the plan and seeds belong to samples or shards, so it makes no difference in which
process, or after how many crashes, a shard is run.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from export import twin
from export.engines import open_engine
from export.engines.threads import budget
from service.audit import attacks, corruptions, samples, targets

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Any, Self

    from torch import nn

    from export.engines.base import Images
    from export.repository import Repository, Version
    from service.audit.plan import Attack, Plan

# Attacked images a shard: seconds of work, so that progress moves and a crash loses little.
SLICE = 50

# Pools of threads on one machine, the engine's and torch's: oversubscribed, both are many times slower.
_POOLS = 2


class Shard(BaseModel):
    """One piece of work; `name` is unique in the audit."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["clean", "attack", "corruption"]
    subject: str = ""
    severity: int = 0
    start: int = 0
    stop: int = 0

    @property
    def name(self) -> str:
        """What a progress line says."""
        match self.kind:
            case "attack":
                return f"{self.subject}, images {self.start + 1} to {self.stop}"
            case "corruption":
                return f"{self.subject}, severity {self.severity}"
        return "clean images"


class ShardResult(BaseModel):
    """What a shard found; flags are strings of 0 and 1, one character an image, in the samples' order.

    Attributes:
        correct: the engine classifies the image (clean or corrupted) correctly.
        agree: its top-1 class is the reference engine's; empty without one.
        reference_correct: the reference engine classifies the image correctly; empty without one.
        robust: epsilon -> correct and not fooled within it.
        queries: images that the engine was asked about.
        seconds: wall time.
        zero_gradients: images at which the twin's loss has no gradient.
        unstable: images whose top-1 class changes when the batch is sent again.
        batch_dependent: images whose top-1 class differs alone and in a batch.
    """

    model_config = ConfigDict(frozen=True)

    shard: Shard
    correct: str
    agree: str = ""
    reference_correct: str = ""
    robust: dict[str, str] = {}
    queries: int
    seconds: float
    zero_gradients: int = 0
    unstable: int = 0
    batch_dependent: int = 0


def shards_of(plan: Plan, *, n: int) -> list[Shard]:
    """Cut a plan over n images into shards, cheap ones first."""
    shards = [Shard(kind="clean", stop=n)]
    if plan.corruptions is not None:
        shards += [
            Shard(kind="corruption", subject=name, severity=severity, stop=n)
            for name in plan.corruptions.names
            for severity in plan.corruptions.severities
        ]
    shards += [
        Shard(kind="attack", subject=attack.id, start=start, stop=min(start + SLICE, n))
        for attack in plan.attacks
        for start in range(0, n, SLICE)
    ]
    return shards


def pin_threads() -> None:
    """Let torch use half of this process's CPUs, and leave the other half to the engine."""
    torch.set_num_threads(budget(_POOLS))


class Auditor:
    """A plan with everything open that its shards need; use it in a `with` block.

    Raises:
        FileNotFoundError: model, reference or data are missing.
        ValueError: an engine or a checkpoint is damaged, data and model do not fit, or a white-box attack has no
            checkpoint to take gradients from.
    """

    def __init__(self, plan: Plan, *, repository: Repository, device: str | None = None) -> None:
        self.plan = plan
        self.version = repository.find(plan.target.model, plan.target.version)
        self.reference_version = _reference(plan, repository)
        self.samples = samples.load(plan.data, class_names=self.version.manifest.class_names)
        self._check_shape()
        self._attacks = {attack.id: attack for attack in plan.attacks}
        module = _twin(plan, repository, self.version)
        self._open = ExitStack()
        with ExitStack() as opening:
            self._target = opening.enter_context(_opened(self.version, device=device))
            self._reference = None
            if self.reference_version is not None:
                self._reference = opening.enter_context(_opened(self.reference_version, device=device))
            self._open = opening.pop_all()
        self._model = targets.AttackModel(self._target, module)

    @property
    def shards(self) -> list[Shard]:
        """All the shards of the plan."""
        return shards_of(self.plan, n=len(self.samples))

    def run(self, shard: Shard) -> ShardResult:
        """Run one shard."""
        started = time.perf_counter()
        before = self._target.queries
        found = getattr(self, f"_run_{shard.kind}")(shard)
        queries = self._target.queries - before
        return ShardResult(shard=shard, queries=queries, seconds=time.perf_counter() - started, **found)

    def close(self) -> None:
        """Close the engines."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run_clean(self, _shard: Shard) -> dict[str, Any]:
        images = samples.as_input(self.samples.images)
        first = self._target.predict(images)
        alone = np.concatenate([self._target.predict(image[None]) for image in images])
        return {
            **self._compared(first, images),
            "unstable": int((self._target.predict(images) != first).sum()),
            "batch_dependent": int((alone != first).sum()),
        }

    def _run_corruption(self, shard: Shard) -> dict[str, Any]:
        seeds = np.array(
            [
                corruptions.image_seed(
                    seed=self.plan.data.seed, index=int(index), name=shard.subject, severity=shard.severity
                )
                for index in self.samples.indices
            ],
            dtype=np.int64,
        )
        corrupted = corruptions.corrupt(self.samples.images, name=shard.subject, severity=shard.severity, seeds=seeds)
        images = samples.as_input(corrupted)
        return self._compared(self._target.predict(images), images)

    def _run_attack(self, shard: Shard) -> dict[str, Any]:
        attack = self._attacks[shard.subject]
        chosen = slice(shard.start, shard.stop)
        images, labels = samples.as_input(self.samples.images[chosen]), self.samples.labels[chosen]
        seed = corruptions.image_seed(
            seed=self.plan.data.seed, index=int(self.samples.indices[shard.start]), name=attack.id, severity=0
        )
        pool = samples.as_input(self.samples.images)
        outcome = attacks.run(attack, model=self._model, images=images, labels=labels, pool=pool, seed=seed)
        found: dict[str, Any] = {
            "correct": _flags(outcome.correct),
            "robust": {epsilon: _flags(robust) for epsilon, robust in outcome.robust.items()},
        }
        if attack.access == "white-box":
            assert self._model.twin is not None
            flat = targets.zero_gradients(self._model.twin, torch.from_numpy(images), torch.from_numpy(labels))
            found["zero_gradients"] = int(flat.sum())
        return found

    def _compared(self, predictions: np.ndarray[Any, Any], images: Images) -> dict[str, Any]:
        found = {"correct": _flags(predictions == self.samples.labels)}
        if self._reference is not None:
            others = self._reference.predict(images)
            found["agree"] = _flags(predictions == others)
            found["reference_correct"] = _flags(others == self.samples.labels)
        return found

    def _check_shape(self) -> None:
        channels, height, width = self.version.manifest.image_shape
        if (actual := self.samples.images.shape[1:]) != (height, width, channels):
            raise ValueError(
                f"the images are {actual[1]} x {actual[0]}, and {self.version} takes {width} x {height}; resize them, "
                "or give data.size"
            )


def _reference(plan: Plan, repository: Repository) -> Version | None:
    if plan.differential is None:
        return None
    return repository.find(plan.differential.reference, plan.differential.version)


@contextmanager
def _opened(version: Version, *, device: str | None) -> Iterator[targets.EngineTarget]:
    with open_engine(version.folder, device=device, instances=_POOLS) as engine:
        yield targets.EngineTarget(engine)


def _twin(plan: Plan, repository: Repository, version: Version) -> nn.Module | None:
    """Load the PyTorch model if an attack wants gradients: frozen, or Foolbox would differentiate its parameters."""
    wanting: list[Attack] = [attack for attack in plan.attacks if attack.access == "white-box"]
    if not wanting:
        return None
    module = twin.load(version, repository=repository)
    if module is None:
        raise ValueError(
            f"attacks.{wanting[0].id}: a white-box attack needs gradients, and {version} has no PyTorch checkpoint; "
            "export it from a training run, or use a decision-based attack"
        )
    return module.requires_grad_(requires_grad=False)


def _flags(values: np.ndarray[Any, Any]) -> str:
    return "".join("01"[bool(value)] for value in values)
