"""How models come and go while they are asked: nothing is lost, nothing is mixed, nothing stays behind."""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import shutil
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient, InferInput

from export import manifest as manifests
from export.engines import open_engine
from export.engines.base import FakeEngine
from export.manifest import FILE_NAME, Parity
from export.repository import Repository, open_repository
from service.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from service.inference import loading
from service.inference.models import Entry, Models
from service.inference.warm_up import warm_up_sizes
from service.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from export.engines.base import Engine, Images, Inputs, Logits
    from export.repository import Version
    from tests.service.conftest import GatedEngine, Loaded, Publish, Start

_SECONDS = 10.0  # far more than anything here takes


def settings_of(**models: object) -> Settings:
    return Settings.model_validate({"models": models})


EXPLICIT = settings_of(mode="explicit", load=("*",))
# Nobody waits for the first poll: `refresh` is the same, at once.
POLL = settings_of(mode="poll", poll_interval_s=3600.0)


FAILED = Parity(status="failed", reference="numpy", explanation="audit 7")
PASSED = Parity(status="passed", reference="numpy", explanation="audit 8")


class Doorway:
    """Opens real engines, but stops before a version that is shut; notes who is inside."""

    def __init__(self, opener: Callable[..., Engine]) -> None:
        self._opener = opener
        self.opened: Counter[str] = Counter()
        self.engines: list[Engine] = []
        self.shut: set[str] = set()
        self.waiting = threading.Semaphore(0)
        self.door = threading.Event()
        self.inside = 0
        self.most_inside = 0
        self._lock = threading.Lock()

    def open(self, folder: Path, **options: object) -> Engine:
        version = f"{folder.parent.name}@{folder.name}"
        with self._lock:
            self.opened[version] += 1
            self.inside += 1
            self.most_inside = max(self.inside, self.most_inside)
        try:
            if version in self.shut:
                self.waiting.release()
                assert self.door.wait(_SECONDS), "nobody opened the door"
            engine = self._opener(folder, **options)
        finally:
            with self._lock:
                self.inside -= 1
        self.engines.append(engine)
        return engine

    async def reached(self, times: int = 1) -> None:
        for _ in range(times):
            assert await asyncio.to_thread(self.waiting.acquire, timeout=_SECONDS)


@pytest.fixture
def doorway(monkeypatch: pytest.MonkeyPatch) -> Doorway:
    doorway = Doorway(open_engine)
    monkeypatch.setattr(loading, "open_engine", doorway.open)
    return doorway


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(_SECONDS):
        while not holds():
            await asyncio.sleep(0.005)


def damage(version: Version) -> None:
    engine = version.folder / "model.onnx"
    engine.write_bytes(b"x" + engine.read_bytes()[1:])


def prove(version: Version, proof: Parity) -> None:
    Repository(version.folder.parents[1]).record_proof(version, proof)


def promote(version: Version, alias: str = "stable") -> None:
    Repository(version.folder.parents[1]).promote(version, alias)


def remove(version: Version) -> None:
    Repository(version.folder.parents[1]).remove(version.manifest.model, version.manifest.version, force=True)


def states(models: Models) -> dict[tuple[str, int], str]:
    return {(entry.name, entry.version): entry.state for entry in models.index()}


# Loading and unloading by clients.


class TestExplicit:
    async def test_only_what_is_named_is_loaded_at_the_start(
        self, loaded: Loaded, tmp_path: Path, publish: Publish
    ) -> None:
        for model in ("first", "second"):
            publish(tmp_path, model)
        async with loaded(tmp_path, settings_of(mode="explicit", load=("second",))) as models:
            assert models.served == ["second"]
            assert models.ready
            assert models.index() == [
                Entry("first", 1, "UNAVAILABLE", "not loaded"),
                Entry("second", 1, "READY", ""),
            ]
            with pytest.raises(NotFound, match="'first' has no version that can be served; version 1: not loaded"):
                models.find("first")
            await models.load("first")
            assert models.find("first").manifest.model == "first"

    async def test_a_model_to_load_that_is_not_there_is_told_at_the_start(
        self, tmp_path: Path, publish: Publish
    ) -> None:
        publish(tmp_path, "linear")
        models = Models(tmp_path, settings_of(mode="explicit", load=("linear", "typo")))
        with pytest.raises(FileNotFoundError, match=r"models.load: expected models of .* \(linear\), got typo"):
            await models.start()
        await models.close()

    @pytest.mark.parametrize("mode", ["none", "poll"])
    async def test_other_modes_let_clients_load_nothing(
        self, loaded: Loaded, tmp_path: Path, publish: Publish, mode: str
    ) -> None:
        publish(tmp_path, "linear")
        async with loaded(tmp_path, settings_of(mode=mode)) as models:
            for call in (models.load, models.unload):
                with pytest.raises(FailedPrecondition, match=f"models.mode is '{mode}'; set it to 'explicit'"):
                    await call("linear")
            assert models.served == ["linear"]

    async def test_unknown_models(self, loaded: Loaded, tmp_path: Path, publish: Publish) -> None:
        publish(tmp_path, "linear")
        async with loaded(tmp_path, EXPLICIT) as models:
            with pytest.raises(NotFound, match="model 'nobody': not in the repository; its models are: linear"):
                await models.load("nobody")
            with pytest.raises(InvalidArgument, match="expected letters, digits"):
                await models.load("../linear")
            await models.unload("nobody")
            assert models.index() == [Entry("linear", 1, "READY", "")]

    async def test_a_new_version_is_served_once_it_is_loaded(
        self, loaded: Loaded, tmp_path: Path, publish: Publish, images: Images, *, weights: Any
    ) -> None:
        publish(tmp_path, "linear", seed=0)
        async with loaded(tmp_path, EXPLICIT) as models:
            publish(tmp_path, "linear", seed=1)
            await models.refresh()
            assert models.find("linear").manifest.version == 1
            assert models.index()[1] == Entry("linear", 2, "UNAVAILABLE", "not loaded")
            await models.load("linear")
            assert models.versions("linear") == [1, 2]
            answers = await models.find("linear").infer(images[:2])
        np.testing.assert_allclose(answers, images[:2].reshape(2, -1) @ weights(1), rtol=1e-4, atol=1e-4)

    async def test_reloads_under_load_lose_nothing_and_mix_nothing(
        self, loaded: Loaded, tmp_path: Path, publish: Publish, images: Images, *, weights: Any
    ) -> None:
        publish(tmp_path, "linear", seed=0)
        answered: Counter[int] = Counter()
        done = False

        async def ask(models: Models, start: int) -> None:
            batch = images[start : start + 1 + start % 3]
            while not done:
                version = models.find("linear")
                await asyncio.sleep(0)  # as where images have to be decoded first
                logits = await version.infer(batch)
                number = version.manifest.version
                expected = batch.reshape(len(batch), -1) @ weights(number - 1)
                np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
                answered[number] += 1

        only_the_newest = settings_of(mode="explicit", load=("*",), versions="latest")
        async with loaded(tmp_path, only_the_newest) as models:
            callers = [asyncio.create_task(ask(models, start)) for start in range(16)]
            for seed in range(1, 5):
                seen = answered[seed]
                await eventually(lambda seen=seen, seed=seed: answered[seed] > seen + 20)  # type: ignore[misc]
                publish(tmp_path, "linear", seed=seed)
                await models.load("linear")
                await models.load("linear")  # the same once more
                assert models.versions("linear") == [seed + 1]
            await eventually(lambda: answered[5] > 20)
            done = True
            await asyncio.gather(*callers)
            await eventually(lambda: len(models.index()) == 5 and list(states(models).values()).count("READY") == 1)
        assert set(answered) == {1, 2, 3, 4, 5}

    async def test_the_old_version_answers_until_the_new_one_does(
        self, loaded: Loaded, tmp_path: Path, publish: Publish, images: Images, *, doorway: Doorway
    ) -> None:
        publish(tmp_path, "linear")
        async with loaded(tmp_path, settings_of(mode="explicit", load=("*",), versions="latest")) as models:
            publish(tmp_path, "linear")
            doorway.shut.add("linear@2")
            load = asyncio.create_task(models.load("linear"))
            await doorway.reached()
            assert states(models) == {("linear", 1): "READY", ("linear", 2): "LOADING"}
            assert models.ready
            assert models.find("linear").manifest.version == 1
            assert len(await models.find("linear").infer(images[:1])) == 1
            doorway.door.set()
            await load
            assert models.find("linear").manifest.version == 2

    async def test_a_failed_load_leaves_what_is_served(
        self, loaded: Loaded, tmp_path: Path, publish: Publish, images: Images
    ) -> None:
        publish(tmp_path, "linear")
        async with loaded(tmp_path, EXPLICIT) as models:
            damage(publish(tmp_path, "linear"))
            with pytest.raises(FailedPrecondition, match=r"'linear' could not be loaded: version 2: .*expected sha256"):
                await models.load("linear")
            assert models.ready
            assert models.find("linear").manifest.version == 1
            assert len(await models.find("linear").infer(images[:1])) == 1
            first, second = models.index()
            assert first == Entry("linear", 1, "READY", "")
            assert (second.state, "expected sha256" in second.reason) == ("UNAVAILABLE", True)

    async def test_a_version_damaged_since_it_was_loaded_is_served_as_it_was(
        self, loaded: Loaded, tmp_path: Path, publish: Publish, images: Images
    ) -> None:
        version = publish(tmp_path, "linear")
        whole = (version.folder / "model.onnx").read_bytes()
        async with loaded(tmp_path, EXPLICIT) as models:
            damage(version)
            with pytest.raises(FailedPrecondition, match=r"version 1: .*expected sha256"):
                await models.load("linear")
            assert len(await models.find("linear").infer(images[:1])) == 1
            (entry,) = models.index()
            assert (entry.state, "expected sha256" in entry.reason) == ("READY", True)
            (version.folder / "model.onnx").write_bytes(whole)
            await models.load("linear")
            assert models.index() == [Entry("linear", 1, "READY", "")]

    async def test_blocked_and_unproven_versions_are_refused(
        self, loaded: Loaded, tmp_path: Path, publish: Publish
    ) -> None:
        publish(tmp_path, "linear", parity="failed")
        publish(tmp_path, "linear", parity="not run")
        async with loaded(tmp_path, EXPLICIT) as models:
            with pytest.raises(FailedPrecondition, match=r"version 1: blocked: .*version 2: unproven: "):
                await models.load("linear")

    async def test_unload_answers_what_was_asked(
        self, loaded: Loaded, tmp_path: Path, publish: Publish, images: Images, *, gated: list[GatedEngine]
    ) -> None:
        publish(tmp_path, "linear")
        async with loaded(tmp_path, EXPLICIT) as models:
            version = models.find("linear")
            running = asyncio.create_task(version.infer(images[:1]))
            assert await asyncio.to_thread(gated[0].entered.wait, _SECONDS)
            queued = [asyncio.create_task(version.infer(images[:n])) for n in (8, 3)]
            unload = asyncio.create_task(models.unload("linear"))
            await eventually(lambda: not models.served)
            with pytest.raises(NotFound, match="'linear' has no version that can be served; version 1: unloaded"):
                models.find("linear")
            assert models.index() == [Entry("linear", 1, "UNLOADING", "unloaded")]
            assert models.health == {"linear": False}
            # Who found it before is answered by it, even if the images come only now.
            late = asyncio.create_task(version.infer(images[:2]))
            del version
            await asyncio.sleep(0)
            assert not gated[0].closed.is_set()
            gated[0].gate.set()
            assert [len(await answer) for answer in (running, *queued, late)] == [1, 8, 3, 2]
            await unload
            await eventually(gated[0].closed.is_set)
            await eventually(lambda: models.index() == [Entry("linear", 1, "UNAVAILABLE", "unloaded")])
            assert models.ready

    async def test_unload_does_not_wait_for_ever(
        self, loaded: Loaded, tmp_path: Path, publish: Publish, *, gated: list[GatedEngine]
    ) -> None:
        publish(tmp_path, "linear")
        async with loaded(tmp_path, EXPLICIT) as models:
            held = models.find("linear")
            async with asyncio.timeout(_SECONDS):
                await models.unload("linear")
            assert models.index() == [Entry("linear", 1, "UNLOADING", "unloaded")]
            assert not gated[0].closed.is_set()
            await models.load("linear")
            assert models.find("linear") is not held

    async def test_an_engine_that_failed_is_freed_too(
        self, loaded: Loaded, tmp_path: Path, publish: Publish, images: Images, *, gated: list[GatedEngine]
    ) -> None:
        publish(tmp_path, "linear")

        def fail(inputs: Inputs) -> Logits:
            raise ArithmeticError(f"no logarithm of {len(inputs)}")

        async with loaded(tmp_path, EXPLICIT) as models:
            gated[0]._run = fail  # type: ignore[method-assign]
            with suppress(ArithmeticError):
                await models.find("linear").infer(images[:1])
            await models.unload("linear")
            await eventually(gated[0].closed.is_set)

    async def test_loads_of_one_model_take_turns_and_of_several_do_not(
        self, loaded: Loaded, tmp_path: Path, publish: Publish, doorway: Doorway
    ) -> None:
        for model in ("first", "second"):
            publish(tmp_path, model)
        async with loaded(tmp_path, settings_of(mode="explicit")) as models:
            doorway.shut.update({"first@1", "second@1"})
            loads = [asyncio.create_task(models.load(name)) for name in ("first", "second", "first")]
            unload = asyncio.create_task(models.unload("second"))
            await doorway.reached(2)
            doorway.door.set()
            await asyncio.gather(*loads, unload)
            assert doorway.most_inside == 2
            assert doorway.opened == {"first@1": 2, "second@1": 1}
            assert models.served == ["first"]

    async def test_a_caller_who_gives_up_does_not_stop_a_load(
        self, loaded: Loaded, tmp_path: Path, publish: Publish, doorway: Doorway
    ) -> None:
        publish(tmp_path, "linear")
        async with loaded(tmp_path, settings_of(mode="explicit")) as models:
            doorway.shut.add("linear@1")
            load = asyncio.create_task(models.load("linear"))
            await doorway.reached()
            load.cancel()
            with pytest.raises(asyncio.CancelledError):
                await load
            doorway.door.set()
            await eventually(lambda: models.served == ["linear"])

    async def test_the_end_frees_what_is_being_loaded(self, tmp_path: Path, publish: Publish, doorway: Doorway) -> None:
        publish(tmp_path, "linear")
        models = Models(tmp_path, settings_of(mode="explicit"))
        await models.start()
        doorway.shut.add("linear@1")
        load = asyncio.create_task(models.load("linear"))
        await doorway.reached()
        await models.drain()
        closing = asyncio.create_task(models.close())
        doorway.door.set()
        with pytest.raises(FailedPrecondition, match="shutting down"):
            await load
        await closing
        assert not models.served
        with pytest.raises(RuntimeError, match="the engine is closed"):
            doorway.engines[0](np.zeros((1, 3, 4, 4), np.float32))
        with pytest.raises(Unavailable, match="shutting down"):
            await models.load("linear")


# What is served of what is there.


class TestChoice:
    async def test_the_newest_versions(self, loaded: Loaded, tmp_path: Path, publish: Publish) -> None:
        for _ in range(3):
            publish(tmp_path, "linear")
        damage(publish(tmp_path, "linear"))
        publish(tmp_path, "linear", parity="failed")
        async with loaded(tmp_path, settings_of(versions="latest", latest=2)) as models:
            # 5 is blocked, and 4 does not load: the next older ones take their places.
            assert models.versions("linear") == [2, 3]
            with pytest.raises(NotFound, match=r"version 1 cannot be served: not chosen: \[models\] versions is 'lat"):
                models.find("linear", "1")

    async def test_aliased_versions(self, loaded: Loaded, tmp_path: Path, publish: Publish) -> None:
        versions = [publish(tmp_path, "linear") for _ in range(3)]
        promote(versions[0], "stable")
        promote(versions[1], "canary")
        async with loaded(tmp_path, settings_of(versions="aliased", default_alias="stable")) as models:
            assert models.versions("linear") == [1, 2]
            assert models.find("linear", "stable").manifest.version == 1
            assert models.find("linear", "canary").manifest.version == 2
            assert models.find("linear").manifest.version == 1
            assert models.find("linear", "2").manifest.version == 2
            assert models.find("linear", "0002").manifest.version == 2
            with pytest.raises(
                InvalidArgument, match=r"'beta': expected a whole number, an alias .*\(canary, stable\)"
            ):
                models.find("linear", "beta")

    async def test_the_default_alias_decides_only_where_there_is_one(
        self, loaded: Loaded, tmp_path: Path, publish: Publish
    ) -> None:
        promote(publish(tmp_path, "with"))
        publish(tmp_path, "with")
        for _ in range(2):
            publish(tmp_path, "without")
        async with loaded(tmp_path, settings_of(default_alias="stable")) as models:
            assert models.find("with").manifest.version == 1
            assert models.find("without").manifest.version == 2

    async def test_the_default_is_served_though_it_is_old(
        self, loaded: Loaded, tmp_path: Path, publish: Publish
    ) -> None:
        promote(publish(tmp_path, "linear"))
        for _ in range(2):
            publish(tmp_path, "linear")
        async with loaded(tmp_path, settings_of(versions="latest", default_alias="stable")) as models:
            assert models.versions("linear") == [1, 3]
            assert models.find("linear").manifest.version == 1

    async def test_a_default_that_does_not_answer_is_not_replaced_in_silence(
        self, loaded: Loaded, tmp_path: Path, publish: Publish
    ) -> None:
        publish(tmp_path, "linear")
        second = publish(tmp_path, "linear")
        promote(second)
        damage(second)
        async with loaded(tmp_path, settings_of(default_alias="stable")) as models:
            with pytest.raises(
                NotFound, match=r"default alias 'stable': .*version 2 cannot be served: .*expected sha2"
            ):
                models.find("linear")
            with pytest.raises(NotFound, match=r"alias 'stable': .*version 2 cannot be served"):
                models.find("linear", "stable")
            assert models.find("linear", "1").manifest.version == 1

    async def test_one_models_settings(
        self, loaded: Loaded, tmp_path: Path, publish: Publish, gated: list[GatedEngine]
    ) -> None:
        for model in ("first", "second"):
            publish(tmp_path, model)
        settings = Settings.model_validate(
            {"model": {"second": {"engine": {"instances": 2}, "batching": {"max_batch_size": 3}}}}
        )
        async with loaded(tmp_path, settings) as models:
            assert [engine.manifest.model for engine in gated] == ["first", "second", "second"]
            assert (models.find("first").max_batch, models.find("second").max_batch) == (8, 3)


# What happens in the repository meanwhile.


class TestPoll:
    async def test_versions_and_models_come_and_go(
        self, loaded: Loaded, tmp_path: Path, publish: Publish, doorway: Doorway
    ) -> None:
        first = publish(tmp_path, "linear")
        changes = 0

        def changed() -> None:
            nonlocal changes
            changes += 1

        async with loaded(tmp_path, POLL) as models:
            models.on_change = changed
            publish(tmp_path, "linear")
            publish(tmp_path, "other")
            await models.refresh()
            assert models.versions("linear") == [1, 2]
            assert models.served == ["linear", "other"]
            assert changes
            remove(first)
            shutil.rmtree(tmp_path / "other")
            await models.refresh()
            assert models.versions("linear") == [2]
            with pytest.raises(NotFound, match="model 'linear' has no version 1; the versions are: 2"):
                models.find("linear", "1")
            with pytest.raises(NotFound, match="model 'other': not served here; the models are: linear"):
                models.find("other")
            assert models.health == {"linear": True, "other": False}
            assert models.ready
            await models.refresh()
            # What has not changed is not opened again.
            assert doorway.opened == {"linear@1": 1, "linear@2": 1, "other@1": 1}
            await eventually(lambda: states(models) == {("linear", 2): "READY"})

    async def test_it_looks_by_itself(self, loaded: Loaded, tmp_path: Path, publish: Publish) -> None:
        publish(tmp_path, "linear")
        async with loaded(tmp_path, settings_of(mode="poll", poll_interval_s=0.1)) as models:
            publish(tmp_path, "linear")
            await eventually(lambda: models.versions("linear") == [1, 2])

    async def test_aliases_move(self, loaded: Loaded, tmp_path: Path, publish: Publish) -> None:
        first, second = (publish(tmp_path, "linear") for _ in range(2))
        promote(first)
        async with loaded(tmp_path, settings_of(mode="poll", versions="aliased", default_alias="stable")) as models:
            assert models.versions("linear") == [1]
            promote(second)
            await models.refresh()
            assert models.versions("linear") == [2]
            assert models.find("linear").manifest.version == 2

    async def test_an_alias_that_moves_to_what_does_not_load_stays(
        self, loaded: Loaded, tmp_path: Path, publish: Publish
    ) -> None:
        first, second = (publish(tmp_path, "linear") for _ in range(2))
        promote(first)
        async with loaded(tmp_path, settings_of(mode="poll", versions="aliased", default_alias="stable")) as models:
            promote(second)
            damage(second)
            await models.refresh()
            assert models.find("linear").manifest.version == 1
            assert models.find("linear", "stable").manifest.version == 1
            assert states(models) == {("linear", 1): "READY", ("linear", 2): "UNAVAILABLE"}

    async def test_what_is_blocked_stops(
        self, loaded: Loaded, tmp_path: Path, publish: Publish, caplog: pytest.LogCaptureFixture
    ) -> None:
        publish(tmp_path, "linear")
        second = publish(tmp_path, "linear")
        async with loaded(tmp_path, POLL) as models:
            prove(second, FAILED)
            await models.refresh()
            assert models.versions("linear") == [1]
            with pytest.raises(NotFound, match=r"version 2 cannot be served: blocked: .*audit 7"):
                models.find("linear", "2")
            assert "linear@2 is not served: blocked" in caplog.text

    async def test_what_is_blocked_while_it_is_loaded_is_never_served(
        self, loaded: Loaded, tmp_path: Path, publish: Publish, doorway: Doorway
    ) -> None:
        publish(tmp_path, "linear")
        async with loaded(tmp_path, POLL) as models:
            second = publish(tmp_path, "linear")
            doorway.shut.add("linear@2")
            poll = asyncio.create_task(models.refresh())
            await doorway.reached()
            prove(second, FAILED)
            await models.refresh()
            doorway.door.set()
            await poll
            assert models.versions("linear") == [1]
            assert models.index()[1].reason.startswith("blocked: ")

    async def test_what_is_proved_starts(
        self, loaded: Loaded, tmp_path: Path, publish: Publish, doorway: Doorway
    ) -> None:
        version = publish(tmp_path, "linear", parity="not run")
        async with loaded(tmp_path, POLL) as models:
            assert not models.served
            prove(version, PASSED)
            await models.refresh()
            assert models.index() == [Entry("linear", 1, "READY", "")]
            prove(version, PASSED)
            await models.refresh()
            assert doorway.opened == {"linear@1": 1}

    async def test_a_repository_that_vanishes_for_a_moment(
        self, loaded: Loaded, tmp_path: Path, publish: Publish, images: Images, *, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = tmp_path / "models"
        publish(folder, "linear")
        async with loaded(folder, POLL) as models:
            with caplog.at_level(logging.INFO):
                folder.rename(tmp_path / "elsewhere")
                await models.refresh()
                folder.mkdir()  # as a mount point without its volume
                await models.refresh()
                assert models.ready
                assert len(await models.find("linear").infer(images[:1])) == 1
                assert caplog.text.count("the repository cannot be looked at") == 1
                folder.rmdir()
                (tmp_path / "elsewhere").rename(folder)
                publish(folder, "linear")
                await models.refresh()
            assert "can be looked at again" in caplog.text
            assert models.versions("linear") == [1, 2]

    async def test_the_last_model_may_go(self, loaded: Loaded, tmp_path: Path, publish: Publish) -> None:
        version = publish(tmp_path, "linear")
        async with loaded(tmp_path, POLL) as models:
            remove(version)
            await models.refresh()
            assert not models.served
            assert models.ready

    async def test_a_damaged_model_json_leaves_the_aliases(
        self, loaded: Loaded, tmp_path: Path, publish: Publish
    ) -> None:
        promote(publish(tmp_path, "linear"))
        async with loaded(tmp_path, settings_of(mode="poll", versions="aliased")) as models:
            (tmp_path / "linear" / "model.json").write_text("{")
            await models.refresh()
            assert models.find("linear", "stable").manifest.version == 1

    async def test_a_damaged_manifest_leaves_the_version(
        self, loaded: Loaded, tmp_path: Path, publish: Publish
    ) -> None:
        manifest = publish(tmp_path, "linear").folder / FILE_NAME
        whole = manifest.read_bytes()
        async with loaded(tmp_path, POLL) as models:
            manifest.write_text("{")
            await models.refresh()
            (entry,) = models.index()
            assert (entry.state, "expected JSON" in entry.reason) == ("READY", True)
            manifest.write_bytes(whole)
            await models.refresh()
            assert models.index() == [Entry("linear", 1, "READY", "")]

    async def test_what_failed_is_not_tried_at_every_look(
        self, loaded: Loaded, tmp_path: Path, publish: Publish, *, doorway: Doorway, caplog: pytest.LogCaptureFixture
    ) -> None:
        publish(tmp_path, "linear")
        async with loaded(tmp_path, POLL) as models:
            second = publish(tmp_path, "linear")
            damage(second)
            for _ in range(3):
                await models.refresh()
            assert doorway.opened["linear@2"] == 1
            assert caplog.text.count("linear@2 is not served") == 1
            # It has changed, so that it may load now.
            shutil.copy(publish(tmp_path, "other", seed=1).folder / "model.onnx", second.folder)
            mended = {"sha256": manifests.sha256_of(second.folder / "model.onnx")}
            (second.folder / FILE_NAME).write_bytes(second.manifest.model_copy(update=mended).as_json())
            await models.refresh()
            assert models.versions("linear") == [1, 2]

    async def test_a_later_model_that_does_not_load_leaves_the_server_ready(
        self, loaded: Loaded, tmp_path: Path, publish: Publish
    ) -> None:
        publish(tmp_path, "linear")
        async with loaded(tmp_path, POLL) as models:
            damage(publish(tmp_path, "later"))
            await models.refresh()
            assert models.ready
            assert models.health == {"later": False, "linear": True}

    async def test_an_object_store_is_not_fetched_from_again(
        self, loaded: Loaded, tmp_path: Path, publish: Publish, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        source = publish(tmp_path / "folder", "linear")
        memory = importlib.import_module("fsspec").filesystem("memory")
        location = f"memory://{uuid.uuid4().hex}/models"
        for path in sorted(source.folder.parent.rglob("*")):
            if path.is_file():
                memory.pipe_file(f"{location}/{path.relative_to(tmp_path / 'folder')}", path.read_bytes())
        fetched: list[str] = []
        get_file = type(memory).get_file

        def fetch(filesystem: Any, path: str, *rest: Any, **options: Any) -> None:
            fetched.append(path)
            get_file(filesystem, path, *rest, **options)

        monkeypatch.setattr(type(memory), "get_file", fetch)
        async with loaded(location, POLL) as models:
            assert models.versions("linear") == [1]
            first = list(fetched)
            assert first
            for _ in range(3):
                await models.refresh()
            assert fetched == first
            store = open_repository(location)
            store.record_proof(store.find("linear"), FAILED)
            await models.refresh()
            assert not models.served
            memory.rm(location, recursive=True)


# By real clients of a real server.


class TestOverTheWire:
    def test_reloads_under_load_lose_nothing_and_mix_nothing(
        self, start: Start, tmp_path: Path, publish: Publish, images: Images, *, weights: Any
    ) -> None:
        publish(tmp_path, "linear", seed=0)
        address = start(tmp_path, settings_of(mode="explicit", load=("*",), versions="latest")).address
        answered: Counter[int] = Counter()
        done = threading.Event()

        def ask(first: int) -> None:
            batch = images[first : first + 1 + first % 3]
            tensor = InferInput("images", list(batch.shape), "FP32")
            tensor.set_data_from_numpy(batch)
            with InferenceServerClient(address) as client:
                while not done.is_set():
                    result = client.infer("linear", [tensor])
                    version = int(result.get_response().model_version)
                    expected = batch.reshape(len(batch), -1) @ weights(version - 1)
                    np.testing.assert_allclose(result.as_numpy("logits"), expected, rtol=1e-4, atol=1e-4)
                    answered[version] += 1

        with InferenceServerClient(address) as operator, ThreadPoolExecutor(4) as pool:
            callers = [pool.submit(ask, first) for first in range(4)]
            try:
                for seed in range(1, 6):
                    self._answers_come(answered, version=seed, within=done)
                    publish(tmp_path, "linear", seed=seed)
                    operator.load_model("linear")
                self._answers_come(answered, version=6, within=done)
            finally:
                done.set()
            for caller in callers:
                caller.result(_SECONDS)

    def _answers_come(self, answered: Counter[int], *, version: int, within: threading.Event) -> None:
        end = time.monotonic() + _SECONDS
        while not answered[version]:
            assert time.monotonic() < end, f"no answer of version {version}"
            within.wait(0.005)

    def test_a_stream_that_is_idle_keeps_no_model(
        self, start: Start, tmp_path: Path, publish: Publish, images: Images, *, gated: list[GatedEngine]
    ) -> None:
        publish(tmp_path, "linear")
        address = start(tmp_path, EXPLICIT).address
        gated[0].gate.set()
        answers: SimpleQueue[tuple[Any, Any]] = SimpleQueue()
        tensor = InferInput("images", [1, 3, 4, 4], "FP32")
        tensor.set_data_from_numpy(images[:1])
        with InferenceServerClient(address) as client:
            client.start_stream(lambda result, error: answers.put((result, error)))
            client.async_stream_infer("linear", [tensor])
            assert answers.get(timeout=_SECONDS)[1] is None
            client.unload_model("linear")
            assert gated[0].closed.wait(_SECONDS)
            client.stop_stream()


# Warm-up, cache, statistics.


@pytest.mark.parametrize(
    ("which", "sizes"),
    [("all", [8, 7, 6, 5, 4, 3, 2, 1]), ("powers", [8, 4, 2, 1]), ("one", [1])],
)
async def test_every_instance_is_warmed_up(
    loaded: Loaded, tmp_path: Path, publish: Publish, *, gated: list[GatedEngine], which: str, sizes: list[int]
) -> None:
    publish(tmp_path, "linear")
    settings = Settings.model_validate({"models": {"warm_up": which}, "engine": {"instances": 2}})
    async with loaded(tmp_path, settings) as models:
        assert [engine.warmed_up for engine in gated] == [sizes, sizes]
        assert models.find("linear").statistics.images == 0


def test_warm_up_ends_with_the_largest_batch() -> None:
    assert warm_up_sizes(6, "powers") == [6, 4, 2, 1]
    assert warm_up_sizes(1, "all") == warm_up_sizes(1, "powers") == [1]


class Insatiable(FakeEngine):
    """Has no memory for more than one image."""

    open = True

    def _run(self, inputs: Inputs) -> Logits:
        if len(inputs) > 1:
            raise RuntimeError(f"out of memory at {len(inputs)} images")
        return super()._run(inputs)

    def close(self) -> None:
        self.open = False


async def test_a_version_that_fails_its_warm_up_is_not_served(
    loaded: Loaded, tmp_path: Path, publish: Publish, weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Insatiable(publish(tmp_path, "linear").manifest, weights=weights(0))
    monkeypatch.setattr(loading, "open_engine", lambda *_, **__: engine)
    async with loaded(tmp_path) as models:
        assert models.index() == [Entry("linear", 1, "UNAVAILABLE", "out of memory at 8 images")]
        assert not models.ready
        assert not engine.open


async def test_the_cache_answers_the_same_images(
    loaded: Loaded, tmp_path: Path, publish: Publish, images: Images, *, gated: list[GatedEngine]
) -> None:
    publish(tmp_path, "linear")
    async with loaded(tmp_path, Settings.model_validate({"cache": {"enabled": True}})) as models:
        gated[0].gate.set()
        version = models.find("linear")
        first, again, other = [await version.infer(batch) for batch in (images[:2], images[:2].copy(), images[1:3])]
        assert gated[0].batches == [2, 2]
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)
        assert (version.statistics.cache_hits.count, version.statistics.cache_misses.count) == (1, 2)


async def test_statistics_go_on_after_a_reload(
    loaded: Loaded, tmp_path: Path, publish: Publish, images: Images
) -> None:
    publish(tmp_path, "linear")
    async with loaded(tmp_path, EXPLICIT) as models:
        await models.find("linear").infer(images[:3])
        await models.load("linear")
        await models.find("linear").infer(images[:2])
        assert models.find("linear").statistics.images == 5


@pytest.mark.slow
async def test_memory_returns_after_unloads(loaded: Loaded, tmp_path: Path, publish: Publish, images: Images) -> None:
    publish(tmp_path, "linear")

    async def cycles(models: Models, n: int) -> int:
        for _ in range(n):
            await models.load("linear")
            await models.find("linear").infer(images[:8])
            await models.unload("linear")
            await eventually(lambda: states(models) == {("linear", 1): "UNAVAILABLE"})
        gc.collect()
        return _resident_bytes()

    async with loaded(tmp_path, settings_of(mode="explicit")) as models:
        await cycles(models, 20)  # what is allocated once
        middle = await cycles(models, 90)
        end = await cycles(models, 90)
        assert end - middle < 2 << 20
        assert threading.active_count() < 20


def _resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise AssertionError("Linux tells VmRSS")
