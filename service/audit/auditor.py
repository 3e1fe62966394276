"""The work of an audit, cut into shards whose results depend on the plan alone.

    plan --shards--> [clean | checks | corruption x severity | slice x attack] --Auditor.run--> ShardResult (JSON)

Boundaries are fixed by the plan and seeds belong to samples or shards, so it makes no difference in which
process, or after how many crashes, a shard is run.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from export.engines.threads import budget
from service.audit import corruptions, examples, probing, samples
from service.audit.attack import catalogue, driver
from service.audit.attack.pool import Pool
from service.audit.attack.search import TOLERANCE
from service.audit.attack_tables import epsilon_value
from service.audit.gradient.choice import Gradients
from service.audit.shard import Shard, ShardResult
from service.audit.target import described
from service.audit.target.engine import EngineTarget
from service.audit.target.opening import open_target

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from torch import Tensor

    from export.engines.base import Images, Logits, Stored
    from export.repository import Repository, Version
    from service.audit.attack.search import Search
    from service.audit.plan import Attack, Plan
    from service.audit.report import TargetReport
    from service.audit.target.base import Target
    from service.client import Tls
    from service.client.connection import Token

# Attacked images a shard: seconds of work, so that progress moves and a crash loses little.
SLICE = 50

# Pools of threads on one machine, the engine's and torch's: oversubscribed, both are many times slower.
_POOLS = 2

# Images among which attacks by decisions look for a start: near ones are rare, and each query is counted.
_POOL = 1000

# Bytes of float32 images that are made at once, of however many an audit has: of 224 x 224 pixels, about 100.
_CHUNK_BYTES = 64 << 20

# Names of classes in one line of an error.
_NAMES = 10

# Decimals of a recorded probability: more than any interval resolves.
_DECIMALS = 6


def shards_of(plan: Plan, *, n: int) -> list[Shard]:
    """Cut a plan over n images into shards: cheap ones first, then every attack on a slice before the next slice."""
    shards = [Shard(kind="clean", stop=n), Shard(kind="checks", stop=min(plan.checks.samples, n))]
    if plan.corruptions is not None:
        shards += [
            Shard(kind="corruption", subject=name, severity=severity, stop=n)
            for name in plan.corruptions.names
            for severity in plan.corruptions.severities
        ]
    shards += [
        Shard(kind="attack", subject=attack.id, start=start, stop=min(start + SLICE, n))
        for start in range(0, n, SLICE)
        for attack in plan.attacks
    ]
    return shards


def pin_threads() -> None:
    """Let torch use half of this process's CPUs; the engine has those that it has where it is served."""
    torch.set_num_threads(budget(_POOLS))


class Auditor:
    """A plan with everything open that its shards need; use it in a `with` block.

    Attributes:
        plan: what is done.
        target: what is attacked, open.
        samples: the plan's images.

    Raises:
        ConnectionError: nobody answers at the endpoint.
        FileNotFoundError: model, reference or data are missing.
        ValueError: an engine or a checkpoint is damaged, data and model do not fit, or an attack has no source to take
            gradients from.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        repository: Repository | None,
        device: str | None = None,
        tls: Tls | None = None,
        token: Token | None = None,
    ) -> None:
        self.plan = plan
        self._attacks = {attack.id: attack for attack in plan.attacks}
        self._open = ExitStack()
        with ExitStack() as opening:
            self.target = opening.enter_context(
                open_target(plan.target, repository=repository, device=device, tls=tls, token=token)
            )
            self.samples = _samples(plan, self.target)
            for attack in plan.attacks:
                catalogue.check(attack, classes=len(self.target.class_names), image_shape=self.target.image_shape)
                _check_sendable(attack, step=self.target.domain.step)
            plan.check_gates(class_names=self.target.class_names)
            self.version = _version(plan, repository)
            self.reference_version = _reference(plan, repository)
            self.reference = None
            if self.reference_version is not None:
                self.reference = opening.enter_context(EngineTarget.opened(self.reference_version, device=device))
                self._check_reference(self.reference, self.reference_version)
            self._pool = Pool(self.target, torch.from_numpy(self._inputs(slice(min(_POOL, self._chunk)))))
            self._gradients = Gradients(
                plan,
                version=self.version,
                repository=repository,
                target=self.target,
                samples=self.samples,
                reference=self.reference,
                reference_version=self.reference_version,
            )
            self._open = opening.pop_all()

    @property
    def shards(self) -> list[Shard]:
        """All the shards of the plan."""
        return shards_of(self.plan, n=len(self.samples))

    @property
    def described(self) -> TargetReport:
        """The target, as a report names it."""
        return described.target(self.target, self.version)

    @property
    def reference_described(self) -> TargetReport | None:
        """The reference, as a report names it."""
        if self.reference is None or self.reference_version is None:
            return None
        return described.engine(self.reference_version, self.reference)

    def run(self, shard: Shard) -> ShardResult:
        """Run one shard.

        Raises:
            TargetFailed: the target gave no answer, or one that is none.
        """
        started, before, answering = time.perf_counter(), self._queries, self.target.seconds
        found = getattr(self, f"_run_{shard.kind}")(shard)
        return ShardResult(
            shard=shard,
            queries=self._queries - before,
            seconds=time.perf_counter() - started,
            answering=self.target.seconds - answering,
            **found,
        )

    def close(self) -> None:
        """Close target and reference."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_reference(self, reference: Target, version: Version) -> None:
        """Refuse a reference with which nothing can be compared."""
        for what, own, other in (
            ("classes", self.target.class_names, reference.class_names),
            ("images of shape", self.target.image_shape, reference.image_shape),
        ):
            if own != other:
                raise ValueError(
                    f"differential.reference: expected the {what} of {self.target.name}, {_short(own)}, got "
                    f"{_short(other)} of {reference.name}; compare models of one task"
                )
        if self.version is not None and self.version.manifest.sha256 == version.manifest.sha256:
            raise ValueError(
                f"differential.reference: expected another engine than the target, got {reference.name}, the same "
                "file; compare with the engine that it was made from"
            )

    @property
    def refused(self) -> tuple[str, ...]:
        """Why sources of gradients that the plan wants are not used."""
        return self._gradients.refused

    @property
    def _queries(self) -> int:
        """What the target was asked without the pool: its questions belong to the process, and to no shard."""
        return self.target.queries - self._pool.queries

    def _run_clean(self, _shard: Shard) -> dict[str, Any]:
        return self._answered(lambda chosen: self.samples.images[chosen])

    def _run_checks(self, shard: Shard) -> dict[str, Any]:
        chosen = slice(shard.start, shard.stop)
        return {
            "probes": probing.probe(
                target=self.target,
                sources=self._gradients.of_checks,
                attacks=self.plan.attacks,
                images=torch.from_numpy(self._inputs(chosen)),
                labels=torch.from_numpy(self.samples.labels[chosen]),
                seed=self._seed("checks", 0, int(self.samples.indices[0])),
            )
        }

    def _run_corruption(self, shard: Shard) -> dict[str, Any]:
        def corrupted(chosen: slice) -> Stored:
            seeds = [self._seed(shard.subject, shard.severity, int(index)) for index in self.samples.indices[chosen]]
            return corruptions.corrupt(
                self.samples.images[chosen],
                name=shard.subject,
                severity=shard.severity,
                seeds=np.array(seeds, dtype=np.int64),
            )

        return self._answered(corrupted)

    def _run_attack(self, shard: Shard) -> dict[str, Any]:
        attack = self._attacks[shard.subject]
        chosen = slice(shard.start, shard.stop)
        search, reference = driver.search_of(
            attack,
            self.target,
            torch.from_numpy(self._inputs(chosen)),
            torch.from_numpy(self.samples.labels[chosen]),
            reference=self.reference,
            reference_source=self._gradients.of_reference,
        )
        sources = self._gradients.of(attack)
        parts = driver.run(
            attack,
            search,
            sources=sources,
            generator_seed=self._seed(attack.id, 0, int(self.samples.indices[shard.start])),
            pool=self._pool,
            surrogates=self._gradients.surrogates,
            reference=reference,
        )
        return {
            **self._found(search, attack=attack.id),
            "by_part": {name: _distances(distances) for name, distances in parts.items()},
            "agreement": {source.name: source.agreement for source in sources},
            "examples": examples.nearest(
                attack=attack.id,
                start=shard.start,
                clean=search.images.numpy(),
                adversarial=search.adversarial.numpy(),
                distances=search.distances.numpy(),
            ),
        }

    def _found(self, search: Search, *, attack: str) -> dict[str, Any]:
        answers = self.target(search.adversarial.numpy())
        found = {
            "distances": _distances(search.distances),
            "asked": tuple(search.queries.tolist()),
            "first_success": tuple(search.first_success.tolist()),
            "adversarial_predictions": tuple(answers.argmax(axis=1).tolist()),
            "adversarial_confidences": _confidences(answers),
            "budget_spent": search.spent,
        }
        unrounded = driver.unrounded(self._attacks[attack], search)
        if unrounded is not None:
            found["unrounded"] = _distances(unrounded)
        if self._attacks[attack].budget is not None:
            found["halfway"] = _distances(search.halfway)
        if self.reference is not None:
            found["reference_adversarial"] = tuple(self.reference.predict(search.adversarial.numpy()).tolist())
        return found

    @property
    def _chunk(self) -> int:
        """Images that are float32 at once: whole batches of the target, and at least one."""
        channels, height, width = self.target.image_shape
        fitting = _CHUNK_BYTES // (4 * channels * height * width)
        return max(1, fitting // self.target.max_batch) * self.target.max_batch

    def _answered(self, stored: Callable[[slice], Stored]) -> dict[str, Any]:
        """Return what target and reference say to all samples, as `stored` gives them, in chunks."""
        predictions: list[int] = []
        confidences: list[float] = []
        others: list[int] = []
        for start in range(0, len(self.samples), self._chunk):
            images = samples.as_input(stored(slice(start, start + self._chunk)))
            answers = self.target(images)
            predictions += answers.argmax(axis=1).tolist()
            confidences += _confidences(answers)
            if self.reference is not None:
                others += self.reference.predict(images).tolist()
        return {
            "predictions": tuple(predictions),
            "confidences": tuple(confidences),
            "reference_predictions": tuple(others),
        }

    def _inputs(self, chosen: slice) -> Images:
        return samples.as_input(self.samples.images[chosen])

    def _seed(self, name: str, severity: int, index: int) -> int:
        return corruptions.image_seed(seed=self.plan.data.seed, index=index, name=name, severity=severity)


def _short(names: tuple[object, ...]) -> str:
    """Return the first few of many for one line."""
    more = ", ..." if len(names) > _NAMES else ""
    return ", ".join(map(str, names[:_NAMES])) + more


def _check_sendable(attack: Attack, *, step: float) -> None:
    """Refuse an epsilon within which nothing but the image itself can be sent: all would be robust."""
    for epsilon in attack.epsilons:
        if attack.norm == "linf" and epsilon_value(epsilon) < step - TOLERANCE:
            raise ValueError(
                f"attacks.{attack.id}: epsilons: expected at least 1/255, a grey level, since the target is sent 8-bit "
                f"images, got {epsilon}; raise it"
            )


def _samples(plan: Plan, target: Any) -> samples.Samples:
    extra = {}
    if isinstance(target, EngineTarget):
        extra["preprocessing"] = target.engine.manifest.preprocessing
    return samples.load(plan.data, class_names=target.class_names, image_shape=target.image_shape, **extra)


def _version(plan: Plan, repository: Repository | None) -> Version | None:
    """Return the version in the repository that is attacked; None for an endpoint's."""
    if plan.target.endpoint is not None:
        return None
    assert repository is not None
    return repository.find(plan.target.model, plan.target.version)


def _reference(plan: Plan, repository: Repository | None) -> Version | None:
    if plan.differential is None:
        return None
    if repository is None:
        raise ValueError("differential: expected a model repository with the reference in it, got none; give one")
    return repository.find(plan.differential.reference, plan.differential.version)


def _distances(found: Tensor) -> tuple[float | None, ...]:
    return tuple(None if np.isinf(size) else float(size) for size in found.tolist())


def _confidences(answers: Logits) -> tuple[float, ...]:
    top = torch.from_numpy(answers).double().softmax(dim=1).amax(dim=1)
    return tuple(round(value, _DECIMALS) for value in top.tolist())
