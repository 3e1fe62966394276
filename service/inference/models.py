"""The models that a server serves: every servable version of a repository, loaded once at the start.

repository --each version--> parity, sha256, engine --ready--> ServedVersion (its engines behind a batcher)
                                                    --not----> a reason, logged and told to who asks for it
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from contextlib import ExitStack
from typing import TYPE_CHECKING

from export.engines import open_engine
from export.manifest import checked_name
from export.repository import open_repository
from service.errors import InvalidArgument, NotFound
from service.inference.batching import Batcher

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from export.engines.base import Engine, Inputs, Logits
    from export.manifest import Manifest, Parity, TensorSpec
    from export.repository import Repository, Version
    from service.settings import Batching, Settings

# No version number has more digits; int() refuses to read some thousands of them.
_LONGEST_VERSION = 18

logger = logging.getLogger(__name__)


class ServedVersion:
    """One version that answers: its manifest, and its engines behind a batcher."""

    def __init__(self, engines: Sequence[Engine], *, batching: Batching) -> None:
        self.manifest: Manifest = engines[0].manifest
        self.max_batch = min(batching.max_batch_size or self.manifest.max_batch, self.manifest.max_batch)
        self._engines = engines
        self._batcher = Batcher(
            engines,
            name=str(self),
            max_batch=self.max_batch,
            max_queue=batching.max_queue_size,
            max_delay_s=batching.max_queue_delay_ms / 1000,
        )

    def __str__(self) -> str:
        return f"{self.manifest.model}@{self.manifest.version}"

    @property
    def input(self) -> TensorSpec:
        """The tensor that an engine takes."""
        return self.manifest.inputs[0]

    @property
    def output(self) -> TensorSpec:
        """The tensor that an engine answers with."""
        return self.manifest.outputs[0]

    async def infer(self, inputs: Inputs) -> Logits:
        """Return the answers to 1 to `max_batch` images, as the engine takes them; raises as `Batcher.submit` does."""
        return await self._batcher.submit(inputs)

    async def drain(self) -> None:
        """Refuse what still comes, and answer what waits."""
        await self._batcher.close()

    async def close(self) -> None:
        """Drain, then free the engines."""
        await self.drain()
        for engine in self._engines:
            engine.close()


class Models:
    """All versions of a repository: those that are served, and why the others are not."""

    def __init__(self) -> None:
        self._served: dict[str, dict[int, ServedVersion]] = defaultdict(dict)
        self._reasons: dict[str, dict[int, str]] = defaultdict(dict)
        self._broken: set[str] = set()
        # Set when the server has been told to end: it still answers, and says that it will not for long.
        self.retiring = False

    async def load(self, folder: str | Path, settings: Settings) -> None:
        """Load every version of a repository; one that cannot be served keeps none of the others from it.

        Raises:
            FileNotFoundError: there is no such folder.
        """
        repository = open_repository(folder)
        for model in repository.models():
            for number in repository.versions(model):
                await self._load_version(repository, model, number, settings=settings)

    async def drain(self) -> None:
        """Refuse what still comes, and answer what waits."""
        await asyncio.gather(*(version.drain() for version in self._all()))

    async def close(self) -> None:
        """Drain, then free all engines."""
        await asyncio.gather(*(version.close() for version in self._all()))

    def _all(self) -> list[ServedVersion]:
        return [version for served in self._served.values() for version in served.values()]

    @property
    def served(self) -> list[str]:
        """The names of the models that have a version that answers."""
        return sorted(self._served)

    @property
    def health(self) -> dict[str, bool]:
        """Whether each model of the repository answers."""
        return {model: model in self._served for model in sorted({*self._served, *self._reasons})}

    @property
    def ready(self) -> bool:
        """Whether no model that should be served is without a version that answers, and none is retiring.

        A model all of whose versions lack the proof of parity is not meant to be served (here, or yet).
        """
        return not self.retiring and self._broken <= self._served.keys()

    def versions(self, model: str) -> list[int]:
        """Return the versions of a model that answer, ascending."""
        return sorted(self._served.get(model, {}))

    def find(self, model: str, version: str = "") -> ServedVersion:
        """Return a version, the latest that answers if none is named.

        Raises:
            InvalidArgument: the name or the version is none.
            NotFound: there is no such model or version, or it could not be loaded; the message says why.
        """
        number = _checked(model, version)
        if model not in self._served and model not in self._reasons:
            known = ", ".join(self.served) or "none"
            raise NotFound(f"model {model!r}: not served here; the models are: {known}")
        served = self._served.get(model, {})
        if number is None and served:
            return served[max(served)]
        if number in served:
            return served[number]
        raise NotFound(self._why_not(model, number))

    def _why_not(self, model: str, number: int | None) -> str:
        reasons = self._reasons.get(model, {})
        if number is None:
            told = "; ".join(f"version {version}: {reason}" for version, reason in sorted(reasons.items()))
            return f"model {model!r} has no version that can be served; {told}"
        if number in reasons:
            return f"model {model!r}: version {number} cannot be served: {reasons[number]}"
        known = ", ".join(map(str, self.versions(model))) or "none"
        return f"model {model!r} has no version {number}; the versions are: {known}"

    async def _load_version(self, repository: Repository, model: str, number: int, *, settings: Settings) -> None:
        try:
            version = await asyncio.to_thread(_described, repository, model, number)
            reason = _reason_against(version.manifest.parity, version=str(version))
            if reason is None:
                engines = await asyncio.to_thread(_open, version, settings=settings)
                self._served[model][number] = ServedVersion(engines, batching=settings.batching)
                return
        except Exception as error:  # noqa: BLE001 - whatever a file or a runtime does, the other models are served
            reason = str(error)
            self._broken.add(model)
        self._reasons[model][number] = reason
        logger.warning("%s@%s is not served: %s", model, number, reason)


def _checked(model: str, version: str) -> int | None:
    try:
        # Nothing but a plain name can be in the repository; an empty one is merely unknown.
        checked_name(model or "none")
    except ValueError as error:
        raise InvalidArgument(str(error)) from None
    if not version:
        return None
    if not (version.isascii() and version.isdecimal() and len(version) <= _LONGEST_VERSION):
        raise InvalidArgument(f"model version {version!r}: expected a whole number, or nothing for the latest")
    return int(version)


def _described(repository: Repository, model: str, number: int) -> Version:
    """Return a version whose manifest is its own, of one image in and one answer out."""
    version = repository.find(model, number)
    manifest = version.manifest
    if (manifest.model, manifest.version) != (model, number):
        raise ValueError(f"its manifest is that of {version}; export the model again")
    if len(manifest.inputs) != 1 or len(manifest.outputs) != 1:
        counts = f"{len(manifest.inputs)} inputs and {len(manifest.outputs)} outputs"
        raise ValueError(f"expected one input and one output, got {counts}; export the model again")
    return version


def _reason_against(parity: Parity, *, version: str) -> str | None:
    """Return why a version is not meant to be served, None if it is."""
    explanation = parity.explanation or "no explanation"
    match parity.status:
        case "passed":
            return None
        case "failed":
            return f"blocked: its proof of parity failed: {explanation}; export it in another precision"
        case "not run":
            return (
                f"unproven: its proof of parity has not run: {explanation}; "
                f"complete it with `tenet models verify {version}`"
            )


def _open(version: Version, *, settings: Settings) -> list[Engine]:
    wanted = settings.engine
    with ExitStack() as opened:
        engines = [
            opened.enter_context(
                open_engine(
                    version.folder,
                    device=wanted.device,
                    provider=wanted.provider,
                    threads=wanted.threads,
                    instances=wanted.instances,
                    rebuild=wanted.rebuild,
                    cache=wanted.cache,
                )
            )
            for _ in range(wanted.instances)
        ]
        opened.pop_all()
    return engines
