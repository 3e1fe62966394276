"""The models that a server serves: which, in which versions, and how they come and go.

repository --start, load, poll--> Lifecycle of each model --switch--> find: one look into two dictionaries
                                                          --unload--> found no more, finished, freed
"""

from __future__ import annotations

import asyncio
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

from export.manifest import checked_name
from export.repository import Repository, open_repository
from service.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from service.inference import catalogue
from service.inference.catalogue import Seen
from service.inference.lifecycle import Entry, Lifecycle
from service.inference.loading import Loader
from service.inference.polling import Lookout
from service.inference.serving import ServedVersion

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping
    from pathlib import Path

    from service.inference.statistics import Ledger
    from service.settings import Settings

__all__ = ["Entry", "Models", "ServedVersion"]

# Seconds that an unload waits for the memory to be given back: a version that nobody uses takes milliseconds. One
# that is busy goes on answering afterwards, and the index says UNLOADING.
_PATIENCE_S = 1.0


class Models:
    """All models of a repository: those that are served, and why the others are not.

    Its methods must be called in the event loop, but for `all`.

    Args:
        location: the repository: a folder, or a URL that `open_repository` takes.
        settings: how to serve.

    Attributes:
        retiring: set when the server has been told to end: it still answers, and says that it will not for long.
        on_change: called when what is served, or whether the server is ready, may have changed.

    Raises:
        ValueError: the location is none.
        RuntimeError: the package that speaks to such a store is not installed.
    """

    def __init__(self, location: str | Path, settings: Settings) -> None:
        self.retiring = False
        self.on_change: Callable[[], None] = _nothing
        self._repository = open_repository(location)
        self._settings = settings
        self._loader = Loader(self._repository, settings)
        self._lookout = Lookout(self._repository)
        self._models: dict[str, Lifecycle] = {}
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._polling: asyncio.Task[None] | None = None
        # Models that the server is not ready without, and all that it ever had, for health.
        self._required: frozenset[str] = frozenset()
        self._names: set[str] = set()
        self._served: tuple[ServedVersion, ...] = ()
        self._started = self._ended = False

    @property
    def ledger(self) -> Ledger:
        """The statistics of all versions that were ever served."""
        return self._loader.ledger

    async def start(self) -> None:
        """Load what the settings say; one version that cannot be served keeps none of the others from it.

        Raises:
            FileNotFoundError: there is no such repository, or it lacks a model that the settings name.
            OSError: the store cannot be reached.
        """
        seen = await self._lookout.ask(catalogue.look)
        self._names |= seen.keys()
        wanted = self._wanted(seen)
        self._required = frozenset(wanted)
        self._list({name: model for name, model in seen.items() if name not in wanted})
        await asyncio.gather(*(self._own(self._bring(seen[name])) for name in wanted))
        self._started = True
        self.on_change()
        if self._settings.models.mode == "poll" and not self._ended:
            watching = self._lookout.watch(self._apply, interval_s=self._settings.models.poll_interval_s)
            self._polling = asyncio.create_task(watching)

    async def refresh(self) -> None:
        """Look at the repository now; in the mode `poll` serve what it holds, otherwise only list it.

        What has been blocked is taken out in every mode. A repository that cannot be reached changes nothing.
        """
        if not self._ended and (seen := await self._lookout.look()) is not None:
            await asyncio.gather(*self._apply(seen))

    async def load(self, model: str) -> None:
        """Load a model as the repository has it now, also if it is served already; it goes on answering meanwhile.

        A caller that is cancelled does not stop it.

        Raises:
            InvalidArgument: the name is none.
            NotFound: the repository has no such model.
            FailedPrecondition: clients may not load, or a version cannot be loaded; what was served still is.
            Unavailable: the repository cannot be reached, or the server is shutting down.
        """
        self._check(model)
        await self._own(self._load(model))

    async def unload(self, model: str) -> None:
        """Take all versions of a model out of service at once; what they were asked before is answered.

        Returns when their memory has been given back; if that takes long, before. An unknown model is no error.

        Raises:
            InvalidArgument: the name is none.
            FailedPrecondition: clients may not unload.
            Unavailable: the server is shutting down.
        """
        self._check(model)
        await self._own(self._unload(model))

    def find(self, model: str, version: str = "") -> ServedVersion:
        """Return a version. Whoever holds it is answered by it, though it be taken out meanwhile.

        Args:
            model: its name.
            version: its number, an alias, or "" for the default: the default alias's, or the newest that answers.

        Raises:
            InvalidArgument: the name or the version is none.
            NotFound: there is no such model or version, or it could not be loaded; the message says why.
        """
        lifecycle = self._models.get(model)
        if lifecycle is not None and (found := lifecycle.routes.get(version)) is not None:
            return found
        return self._missing(model, version, lifecycle)

    def versions(self, model: str) -> list[int]:
        """Return the versions of a model that answer, ascending."""
        return sorted(self._models[model].served) if model in self._models else []

    def aliases(self, version: ServedVersion) -> list[str]:
        """Return the aliases that a version answers to, in alphabetical order."""
        manifest = version.manifest
        return self._models[manifest.model].aliases_of(manifest.version) if manifest.model in self._models else []

    def all(self) -> tuple[ServedVersion, ...]:
        """Return all versions that answer, by name and number; any thread may ask."""
        return self._served

    def index(self) -> list[Entry]:
        """Return what there is to say of every version of every model, as the last look has shown them."""
        return [entry for _, lifecycle in sorted(self._models.items()) for entry in lifecycle.entries()]

    @property
    def served(self) -> list[str]:
        """The names of the models that have a version that answers."""
        return sorted(name for name, lifecycle in self._models.items() if lifecycle.served)

    @property
    def health(self) -> dict[str, bool]:
        """Whether each model answers; those that the repository no longer has do not."""
        served = set(self.served)
        return {name: name in served for name in sorted(self._names)}

    @property
    def ready(self) -> bool:
        """Whether all is loaded, no model that was there at the start is without an answer, and none is retiring.

        A model all of whose versions lack the proof of parity is not meant to be served (here, or yet). One that came
        later and never answered makes the server no worse than it was.
        """
        if self.retiring or not self._started:
            return False
        return not any(self._models[name].broken for name in self._required & self._models.keys())

    async def drain(self) -> None:
        """Refuse what still comes, and answer what waits."""
        self._ended = True
        if self._polling is not None:
            self._polling.cancel()
        await asyncio.gather(self._loader.drain(), *(version.drain() for version in self._served))

    async def close(self) -> None:
        """Drain, then free all engines; those that are being loaded, too, if that ends within the grace period."""
        grace_s = self._settings.server.shutdown_grace_s
        # A call of an engine that never ends must not keep the process: its thread is a daemon.
        await asyncio.wait({asyncio.create_task(self.drain()), *self._tasks}, timeout=grace_s)
        await asyncio.wait({asyncio.create_task(self._free())}, timeout=grace_s)

    async def _free(self) -> None:
        await asyncio.gather(*(version.close() for version in self._served))

    def _wanted(self, seen: Mapping[str, Seen]) -> list[str]:
        choice = self._settings.models
        if choice.mode != "explicit" or "*" in choice.load:
            return sorted(seen)
        if unknown := sorted({*choice.load} - seen.keys()):
            known = ", ".join(sorted(seen)) or "none"
            raise FileNotFoundError(
                f"models.load: expected models of {self._repository.location} ({known}), got {', '.join(unknown)}"
            )
        return sorted({*choice.load})

    def _check(self, model: str) -> None:
        mode = self._settings.models.mode
        if mode != "explicit":
            raise FailedPrecondition(
                f"clients may not load and unload models here: models.mode is {mode!r}; set it to 'explicit'"
            )
        if self._ended:
            raise Unavailable("the server is shutting down; try again, or elsewhere")
        _check_name(model)

    async def _load(self, model: str) -> None:
        async with self._lock(model):
            try:
                seen = await self._lookout.ask(partial(catalogue.look_at, model=model))
                if seen is None and model not in self._models:
                    known = ", ".join(await self._lookout.ask(Repository.models)) or "none"
                    raise NotFound(f"model {model!r}: not in the repository; its models are: {known}")
            except OSError as error:
                raise Unavailable(f"model {model!r}: {error}") from None
            if seen is None:
                raise NotFound(f"model {model!r}: no longer in the repository; `unload` ends what is served of it")
            failed = await self._lifecycle(model).bring(seen, reload=True)
        self.on_change()
        if failed:
            told = "; ".join(f"version {number}: {reason}" for number, reason in failed.items())
            raise FailedPrecondition(f"model {model!r} could not be loaded: {told}")
        try:
            self.find(model)
        except NotFound as error:
            raise FailedPrecondition(str(error)) from None

    async def _unload(self, model: str) -> None:
        async with self._lock(model):
            ending = self._models[model].unload() if model in self._models else []
            if ending:
                await asyncio.wait(ending, timeout=_PATIENCE_S)

    async def _bring(self, seen: Seen) -> None:
        async with self._lock(seen.model):
            await self._lifecycle(seen.model).bring(seen, reload=False)
        self.on_change()  # one that failed may leave the server not ready, without a switch

    def _apply(self, seen: Mapping[str, Seen]) -> list[asyncio.Future[None]]:
        """Bring every model in line with what has been seen; return what is done when they are."""
        if self._ended:
            return []
        gone = {name: Seen(name) for name in self._models if name not in seen}
        every = {**seen, **gone}
        for model in every.values():
            self._lifecycle(model.model).refuse(model)
        if self._settings.models.mode != "poll":
            self._list(every)
            return []
        for name in [name for name in gone if self._models[name].ended]:
            del self._models[name], every[name]
        # What is being loaded is looked at again the next time.
        idle = [model for name, model in every.items() if not self._lock(name).locked()]
        return [self._own(self._bring(model)) for model in idle]

    def _list(self, seen: Mapping[str, Seen]) -> None:
        for model in seen.values():
            lifecycle = self._lifecycle(model.model)
            lifecycle.refuse(model)
            lifecycle.listed(model, reason="not loaded")

    def _lifecycle(self, model: str) -> Lifecycle:
        if model not in self._models:
            settings = self._settings.of(model)
            self._models[model] = Lifecycle(
                model, choice=settings.models, loader=self._loader, on_switch=self._switched
            )
            self._names.add(model)
        return self._models[model]

    def _lock(self, model: str) -> asyncio.Lock:
        return self._locks.setdefault(model, asyncio.Lock())

    def _switched(self) -> None:
        self._served = tuple(
            version for _, lifecycle in sorted(self._models.items()) for _, version in sorted(lifecycle.served.items())
        )
        self.on_change()

    def _missing(self, model: str, version: str, lifecycle: Lifecycle | None) -> ServedVersion:
        """Return a version that was written unusually, or say why there is none."""
        if lifecycle is None or not lifecycle.known:
            known = ", ".join(self.served) or "none"
            raise NotFound(f"model {model!r}: not served here; the models are: {known}")
        return lifecycle.find(version)

    def _own(self, work: Coroutine[Any, Any, None]) -> asyncio.Future[None]:
        """Run work that goes on when whoever wanted it has gone."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return asyncio.shield(task)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # its caller may have gone


def _check_name(model: str) -> None:
    try:
        # Nothing but a plain name can be in the repository.
        checked_name(model)
    except ValueError as error:
        raise InvalidArgument(str(error)) from None


def _nothing() -> None:
    """Tell nobody."""
