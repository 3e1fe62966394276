"""Polling: a look at the repository every few seconds, whatever becomes of the repository meanwhile.

repository --every interval--> look --> Seen of every model --> apply
           --cannot be reached-------> what is served goes on; it is said once, and once more when it is back
"""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from service.inference import catalogue
from service.inference.threads import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from export.repository import Repository
    from service.inference.catalogue import Seen

Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)


class Lookout:
    """Looks at a repository, one look at a time: what a store has said is kept between looks, without locks."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._looking = threading.Lock()
        self._lost = False

    async def ask(self, question: Callable[[Repository], Answer]) -> Answer:
        """Return what a function says of the repository; it may take its time."""

        def asked() -> Answer:
            with self._looking:
                return question(self._repository)

        return await in_thread(asked, name="looking at the repository")

    async def look(self) -> Mapping[str, Seen] | None:
        """Return what the repository holds; None, which is logged, where that cannot be told now."""
        try:
            seen = await self.ask(look_again)
        except OSError as error:
            if not self._lost:
                logger.warning("the repository cannot be looked at, and what is served stays as it is: %s", error)
            self._lost = True
            return None
        if self._lost:
            logger.info("the repository %s can be looked at again", self._repository.location)
        self._lost = False
        return seen

    async def watch(self, apply: Callable[[Mapping[str, Seen]], object], *, interval_s: float) -> None:
        """Look every `interval_s` seconds, and hand over what is seen; until cancelled."""
        while True:
            await asyncio.sleep(interval_s)
            try:
                if (seen := await self.look()) is not None:
                    apply(seen)
            except Exception:  # one look that goes wrong must not be the last
                logger.exception("a look at the repository failed; the next one follows")


def look_again(repository: Repository) -> Mapping[str, Seen]:
    """Look at all models of a repository that was there before.

    Raises:
        FileNotFoundError: it is gone, or its folder is empty: a volume that is not mounted. Whoever removes versions
            one by one leaves the files beside them.
        OSError: the store cannot be reached.
    """
    seen = catalogue.look(repository)
    if not seen and "://" not in repository.location and not any(Path(repository.location).iterdir()):
        raise FileNotFoundError(f"{repository.location}: expected a model repository here, found an empty folder")
    return seen
