"""Loading: from a published version to one that answers at full speed, and back.

version --manifest read again--> proved? --sha256, once an engine--> open --> warm up --> ServedVersion --retire--> gone
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from export.engines import open_engine
from service.errors import Unavailable
from service.inference.catalogue import reason_against
from service.inference.serving import ServedVersion, close_all
from service.inference.statistics import Ledger
from service.inference.threads import in_thread
from service.inference.warm_up import largest_batch, warm_up

if TYPE_CHECKING:
    from export.engines.base import Engine
    from export.repository import Repository
    from service.inference.retirement import Retirement
    from service.settings import Settings

# Versions that are loaded at once, each of another model: loading is disk, then one CPU or one GPU.
_AT_ONCE = 4


class NotServable(ValueError):  # noqa: N818 - it is no error of the version
    """A version is not meant to be served: its proof of parity is missing, or failed."""


class Loader:
    """Loads versions in threads, and ends those that were taken out.

    Attributes:
        ledger: the statistics of all versions that were ever served here.
    """

    def __init__(self, repository: Repository, settings: Settings) -> None:
        self.ledger = Ledger()
        self._repository = repository
        self._settings = settings
        self._at_once = asyncio.Semaphore(_AT_ONCE)
        self._retirements: dict[asyncio.Task[None], Retirement] = {}
        self._closed = False

    async def load(self, model: str, number: int) -> ServedVersion:
        """Return a version that answers.

        Raises:
            Unavailable: the server is shutting down.
            Exception: as `engines_of`.
        """
        if self._closed:
            raise _shutting_down()
        settings = self._settings.of(model)
        opening = partial(engines_of, self._repository, model, number, settings=settings)
        async with self._at_once:
            engines = await in_thread(opening, name=f"loading {model}@{number}")
        try:
            if self._closed:
                raise _shutting_down()
            statistics = self.ledger.of(
                model, number, max_batch=largest_batch(engines[0].manifest, settings.batching.max_batch_size)
            )
            return ServedVersion(engines, settings=settings, statistics=statistics)
        except BaseException:
            await asyncio.to_thread(close_all, engines)
            raise

    def retire(self, version: ServedVersion) -> asyncio.Task[None]:
        """End a version that nobody can find any more; the task is done when its memory has been given back."""
        retirement = version.retire()
        task = asyncio.create_task(retirement.run())
        self._retirements[task] = retirement
        task.add_done_callback(self._retirements.pop)
        return task

    async def drain(self) -> None:
        """Load nothing more; have those that were taken out answer what they have, and end."""
        self._closed = True
        for retirement in self._retirements.values():
            retirement.hurry()
        await asyncio.gather(*self._retirements)


def engines_of(repository: Repository, model: str, number: int, *, settings: Settings) -> list[Engine]:
    """Open a version's engines, as many as there are to be instances, and warm them up; takes long.

    Args:
        repository: where the version is; its files are fetched if they are not on this machine.
        model: its name.
        number: the version's.
        settings: those of this model.

    Raises:
        NotServable: it is blocked or unproven, or has become so since it was looked at.
        Exception: whatever its files or its runtime do.
    """
    version = repository.find(model, number)
    if reason := reason_against(version.manifest):
        raise NotServable(reason)
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
        largest = largest_batch(version.manifest, settings.batching.max_batch_size)
        warm_up(engines, largest=largest, which=settings.models.warm_up)
        opened.pop_all()
    return engines


def _shutting_down() -> Unavailable:
    return Unavailable("the server is shutting down; try again, or elsewhere")
