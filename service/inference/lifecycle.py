"""The versions of one model, from the first look to the last answer.

seen --refused: blocked, unproven--> out at once, whoever loads what
     --to be served--> LOADING --engines warmed up--> switch --> READY --no longer wanted--> UNLOADING --> gone
                               --failed--> a reason; what answered before goes on answering

A switch replaces one dictionary by another in the event loop: whoever finds a version finds the old one or the new
one, and is answered by the one that was found.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from service.errors import InvalidArgument, NotFound, ServiceError
from service.inference import catalogue
from service.inference.catalogue import Seen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from export.manifest import Manifest
    from service.inference.loading import Loader
    from service.inference.serving import ServedVersion
    from service.settings import Models as Choice

State = Literal["LOADING", "READY", "UNLOADING", "UNAVAILABLE"]

# Seconds before a version that could not be loaded is tried again, twice as many after each try, unless it has
# changed: reading gigabytes and failing every few seconds would slow the versions that answer.
_FIRST_RETRY_S = 10.0
_LONGEST_RETRY_S = 600.0

# What damaged files, missing libraries and runtimes raise, in words for people; of anything else the log has all.
_EXPECTED = (OSError, ValueError, RuntimeError, ServiceError)

logger = logging.getLogger(__name__)


class Entry(NamedTuple):
    """What the index says of one version."""

    name: str
    version: int
    state: State
    # Why it does not answer; of a ready one, why its newer content could not be loaded. Otherwise "".
    reason: str


@dataclass(frozen=True, slots=True)
class _Failure:
    manifest: Manifest | None
    pause_s: float
    again_at: float  # the event loop's time, seconds


class Lifecycle:
    """One model; its methods that wait are called one at a time.

    Attributes:
        model: its name.
        routes: what callers find: by number, by alias, and by "" for the default.
        served: the versions that answer, by number.
    """

    def __init__(self, model: str, *, choice: Choice, loader: Loader, on_switch: Callable[[], None]) -> None:
        self.model = model
        self.routes: Mapping[str, ServedVersion] = {}
        self.served: Mapping[int, ServedVersion] = {}
        self._choice = choice
        self._loader = loader
        self._on_switch = on_switch
        # As the repository had them when they were loaded.
        self._manifests: dict[int, Manifest] = {}
        # What the aliases point at, and the versions that answer to them meanwhile.
        self._aliases: Mapping[str, int] = {}
        self._answering: dict[str, int] = {}
        self._reasons: dict[int, str] = {}
        self._refusals: Mapping[int, str] = {}
        self._failures: dict[int, _Failure] = {}
        self._loading: set[int] = set()
        self._unloading: Counter[int] = Counter()

    @property
    def broken(self) -> bool:
        """Whether no version answers, though one should."""
        return bool(self._failures) and not self.served

    @property
    def known(self) -> bool:
        """Whether there is anything to say of this model."""
        return bool(self.served or self._reasons or self._loading)

    @property
    def ended(self) -> bool:
        """Whether nothing is left of it, not even a version that is finishing."""
        return not (self.known or self._unloading)

    def refuse(self, seen: Seen) -> None:
        """Take versions out that have been blocked; at any time, whatever is being loaded."""
        self._refusals = seen.refusals()
        for number, reason in self._refusals.items():
            self._note(number, reason)
        self._take_out([number for number in self.served if number in self._refusals])

    def listed(self, seen: Seen, *, reason: str) -> None:
        """Take note of versions that are there and were not loaded, and of those that are gone, for the index."""
        for number in seen.versions:
            if number not in self.served:
                self._reasons.setdefault(number, seen.faults().get(number, reason))
        self._forget(seen)

    async def bring(self, seen: Seen, *, reload: bool) -> dict[int, str]:
        """Serve what is to be served of what has been seen, and nothing else.

        Args:
            seen: the model as it is now.
            reload: whether to load anew what is served already; otherwise that is done only where it has changed.

        Returns:
            Why versions could not be loaded, by number.
        """
        self.refuse(seen)
        if seen.aliases is not None:
            self._aliases = seen.aliases
        self._switch(self.served)
        faults, kept = seen.faults(), set[int]()
        tried = set[int]()
        for number in catalogue.candidates(seen, self._choice, aliases=self._aliases):
            if not self._enough(kept, number):
                tried.add(number)
                if await self._ensure(number, seen.manifests.get(number), fault=faults.get(number), reload=reload):
                    kept.add(number)
        self._take_out([number for number in self.served if number not in kept | self._stand_ins(seen)])
        self._failures = {number: failure for number, failure in self._failures.items() if number in tried}
        self.listed(seen, reason=f"not chosen: [models] versions is {self._choice.versions!r}")
        return {number: self._reasons[number] for number in sorted(self._failures)}

    def unload(self) -> list[asyncio.Task[None]]:
        """Take all versions out; return what is done when they have ended."""
        self._failures.clear()
        self._reasons |= dict.fromkeys(self.served, "unloaded")
        return self._take_out(self.served)

    def entries(self) -> list[Entry]:
        """Return what there is to say of each version, ascending."""
        numbers = sorted({*self.served, *self._reasons, *self._loading, *self._unloading})
        return [Entry(self.model, number, self._state(number), self._reasons.get(number, "")) for number in numbers]

    def aliases_of(self, number: int) -> list[str]:
        """Return the aliases that point at a version."""
        return sorted(alias for alias, target in self._aliases.items() if target == number)

    def find(self, version: str) -> ServedVersion:
        """Return a version that is not among the routes as it was written, or say why there is none.

        Raises:
            InvalidArgument: it is neither a number nor an alias.
            NotFound: it does not answer; the message says why.
        """
        if catalogue.is_number(version):
            if (number := int(version)) in self.served:
                return self.served[number]
            raise NotFound(self._why_not(number))
        if version in self._aliases:
            raise NotFound(f"model {self.model!r}: alias {version!r}: {self._why_not(self._aliases[version])}")
        if version:
            known = ", ".join(sorted(self._aliases)) or "it has none"
            raise InvalidArgument(
                f"model version {version!r}: expected a whole number, an alias of the model ({known}), or nothing for "
                "the default"
            )
        if self.served:
            alias = self._choice.default_alias
            assert alias is not None, "without one, the newest version is the default"
            raise NotFound(f"model {self.model!r}: default alias {alias!r}: {self._why_not(self._aliases[alias])}")
        told = "; ".join(f"version {number}: {reason}" for number, reason in sorted(self._reasons.items()))
        raise NotFound(f"model {self.model!r} has no version that can be served; {told or 'it is being loaded'}")

    def _why_not(self, number: int) -> str:
        if number in self._reasons:
            return f"model {self.model!r}: version {number} cannot be served: {self._reasons[number]}"
        known = ", ".join(map(str, sorted(self.served))) or "none"
        return f"model {self.model!r} has no version {number}; the versions are: {known}"

    def _enough(self, kept: set[int], number: int) -> bool:
        """Whether as many versions are served as are to be; the default one always is."""
        if self._choice.versions != "latest" or len(kept) < self._choice.latest:
            return False
        return self._choice.default_alias is None or number != self._aliases.get(self._choice.default_alias)

    async def _ensure(self, number: int, manifest: Manifest | None, *, fault: str | None, reload: bool) -> bool:
        """Load a version if that is necessary; return whether it, or what was served of it before, answers."""
        if fault is not None or manifest is None:
            self._fail(number, manifest, fault or "no manifest")
        elif reload or self._must_load(number, manifest):
            await self._load(number, manifest)
        return number in self.served

    def _must_load(self, number: int, manifest: Manifest) -> bool:
        failure = self._failures.get(number)
        if failure is not None and failure.manifest == manifest:
            return asyncio.get_running_loop().time() >= failure.again_at
        before = self._manifests.get(number)
        # A new proof of the same engine needs no new engine.
        if before is None or before != manifest.model_copy(update={"parity": before.parity}):
            return True
        self._succeed(number)
        return False

    def _succeed(self, number: int) -> None:
        """Forget what was wrong before."""
        self._failures.pop(number, None)
        self._reasons.pop(number, None)

    async def _load(self, number: int, manifest: Manifest) -> None:
        self._loading.add(number)
        try:
            version = await self._loader.load(self.model, number)
        except Exception as error:  # whatever a file or a runtime does, the other versions are served
            if not isinstance(error, _EXPECTED):
                logger.exception("%s@%s cannot be loaded", self.model, number)
            self._fail(number, manifest, str(error) or type(error).__name__)
            return
        finally:
            self._loading.discard(number)
        if number in self._refusals:  # meanwhile
            self._retire(number, version)
            return
        self._succeed(number)
        self._manifests[number] = manifest
        before = self.served.get(number)
        self._switch({**self.served, number: version})
        logger.info("%s is served", version)
        if before is not None:
            self._retire(number, before)

    def _fail(self, number: int, manifest: Manifest | None, reason: str) -> None:
        before = self._failures.get(number)
        pause_s = min(2 * before.pause_s, _LONGEST_RETRY_S) if before is not None else _FIRST_RETRY_S
        self._failures[number] = _Failure(manifest, pause_s, asyncio.get_running_loop().time() + pause_s)
        self._note(number, reason)

    def _note(self, number: int, reason: str) -> None:
        if self._reasons.get(number) == reason:
            return
        self._reasons[number] = reason
        # What is refused is taken out, whatever it was.
        still = number in self.served and number not in self._refusals
        said = "is not loaded again, and served as it was" if still else "is not served"
        logger.warning("%s@%s %s: %s", self.model, number, said, reason)

    def _switch(self, served: Mapping[int, ServedVersion]) -> None:
        """Have callers find these versions, and no others, from now on."""
        self.served = served
        pointed = {
            # Until the version that an alias has been moved to answers, the one before it does.
            alias: target if target in served else self._answering.get(alias, target)
            for alias, target in self._aliases.items()
        }
        self._answering = {alias: number for alias, number in pointed.items() if number in served}
        routes = {str(number): version for number, version in served.items()}
        routes |= {alias: served[number] for alias, number in self._answering.items()}
        default = self._choice.default_alias
        if default in self._aliases:
            if default in self._answering:
                routes[""] = routes[default]
        elif served:
            routes[""] = served[max(served)]
        self.routes = routes
        self._on_switch()

    def _stand_ins(self, seen: Seen) -> set[int]:
        """Return the versions that answer to an alias until the version it points at does."""
        standing = {n for alias, n in self._answering.items() if self._aliases[alias] not in self.served}
        return standing.intersection(seen.versions)

    def _take_out(self, numbers: Iterable[int]) -> list[asyncio.Task[None]]:
        gone = {number: self.served[number] for number in numbers}
        if not gone:
            return []
        self._switch({number: version for number, version in self.served.items() if number not in gone})
        for number in gone:
            self._manifests.pop(number, None)
        return [self._retire(*gone.popitem()) for _ in range(len(gone))]

    def _retire(self, number: int, version: ServedVersion) -> asyncio.Task[None]:
        self._unloading[number] += 1
        task = self._loader.retire(version)

        def ended(_: asyncio.Task[None]) -> None:
            self._unloading[number] -= 1
            self._unloading = +self._unloading

        task.add_done_callback(ended)
        return task

    def _forget(self, seen: Seen) -> None:
        there = {*seen.versions, *self.served}
        self._reasons = {number: reason for number, reason in self._reasons.items() if number in there}

    def _state(self, number: int) -> State:
        if number in self.served:
            return "READY"
        if number in self._loading:
            return "LOADING"
        return "UNLOADING" if number in self._unloading else "UNAVAILABLE"
