"""Which versions of a repository are served, and what is said of the others."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import numpy as np
import pytest

from export.manifest import FILE_NAME, Requirements
from service.errors import InvalidArgument, NotFound
from service.inference.models import Models
from service.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path

    from export.engines.base import Images
    from tests.service.conftest import GatedEngine, Loaded, Publish


async def test_all_servable_versions_are_served(loaded: Loaded, repository: Path) -> None:
    async with loaded(repository) as models:
        assert models.served == ["linear", "shares", "stored"]
        assert models.versions("linear") == [1, 2]
        assert models.find("linear").manifest.version == 2
        assert models.find("linear", "1").manifest.version == 1
        assert models.health == {"linear": True, "shares": True, "stored": True, "unproven": False}
        # Not meant to be served is not the same as broken.
        assert models.ready


async def test_a_changed_file_is_never_opened(
    loaded: Loaded, tmp_path: Path, publish: Publish, images: Images, caplog: pytest.LogCaptureFixture
) -> None:
    publish(tmp_path, "linear")
    engine = publish(tmp_path, "linear").folder / "model.onnx"
    engine.write_bytes(b"x" + engine.read_bytes()[1:])
    with caplog.at_level(logging.WARNING):
        async with loaded(tmp_path) as models:
            assert models.find("linear").manifest.version == 1
            assert (await models.find("linear").infer(images[:1])).shape == (1, 5)
            with pytest.raises(NotFound, match=r"'linear': version 2 cannot be served: .*expected sha256"):
                models.find("linear", "2")
    assert "linear@2 is not served" in caplog.text


async def test_a_model_without_a_version_that_loads_makes_the_server_not_ready(
    loaded: Loaded, tmp_path: Path, publish: Publish
) -> None:
    publish(tmp_path, "sound")
    publish(tmp_path, "broken").folder.joinpath("model.onnx").unlink()
    async with loaded(tmp_path) as models:
        assert models.served == ["sound"]
        assert not models.ready
        with pytest.raises(NotFound, match=r"'broken' has no version that can be served; version 1: .*expected a file"):
            models.find("broken")


@pytest.mark.parametrize(
    ("parity", "reason"),
    [
        ("failed", "blocked: its proof of parity failed: a test wanted it so; export it in another precision"),
        (
            "not run",
            "unproven: its proof of parity has not run: a test wanted it so; "
            "complete it with `tenet models verify linear@2`",
        ),
    ],
)
async def test_without_its_proof_a_version_is_not_served(
    loaded: Loaded, tmp_path: Path, publish: Publish, parity: str, reason: str
) -> None:
    publish(tmp_path, "linear")
    publish(tmp_path, "linear", parity=parity)
    async with loaded(tmp_path) as models:
        assert models.find("linear").manifest.version == 1
        assert models.ready
        with pytest.raises(NotFound) as caught:
            models.find("linear", "2")
    assert str(caught.value) == f"model 'linear': version 2 cannot be served: {reason}"


@pytest.mark.parametrize("manifest", ["{", "{}", "[]"])
async def test_a_manifest_that_cannot_be_read_is_a_reason(
    loaded: Loaded, tmp_path: Path, publish: Publish, manifest: str
) -> None:
    publish(tmp_path, "linear").folder.joinpath("manifest.json").write_text(manifest)
    async with loaded(tmp_path) as models:
        with pytest.raises(NotFound, match=r"manifest\.json"):
            models.find("linear", "1")


async def test_a_copied_version_is_not_passed_off_as_another(loaded: Loaded, tmp_path: Path, publish: Publish) -> None:
    folder = publish(tmp_path, "linear").folder
    folder.rename(folder.with_name("7"))
    async with loaded(tmp_path) as models:
        with pytest.raises(NotFound, match="its manifest is that of linear@1"):
            models.find("linear", "7")


async def test_one_input_and_one_output(loaded: Loaded, tmp_path: Path, publish: Publish) -> None:
    version = publish(tmp_path, "linear")
    twice = version.manifest.model_copy(update={"outputs": version.manifest.outputs * 2})
    (version.folder / FILE_NAME).write_bytes(twice.as_json())
    async with loaded(tmp_path) as models:
        with pytest.raises(NotFound, match="expected one input and one output, got 1 inputs and 2 outputs"):
            models.find("linear")


async def test_what_this_machine_lacks_is_a_reason(loaded: Loaded, tmp_path: Path, publish: Publish) -> None:
    version = publish(tmp_path, "linear")
    newer = version.manifest.model_copy(update={"requires": Requirements(runtime=">=99.5")})
    (version.folder / FILE_NAME).write_bytes(newer.as_json())
    async with loaded(tmp_path) as models:
        assert not models.ready
        with pytest.raises(NotFound, match=r"linear@1 cannot run here: expected onnxruntime >=99\.5"):
            models.find("linear")


async def test_a_device_that_is_not_there_is_a_reason(loaded: Loaded, tmp_path: Path, publish: Publish) -> None:
    publish(tmp_path, "linear")
    # No machine has a thousand.
    async with loaded(tmp_path, Settings.model_validate({"engine": {"device": "cuda:1000"}})) as models:
        assert not models.ready
        with pytest.raises(NotFound, match=r"expected an NVIDIA GPU, and CUDA finds none|device 'cuda:1000': expected"):
            models.find("linear")


async def test_a_model_that_takes_uint8_is_served_as_it_is(loaded: Loaded, tmp_path: Path, publish: Publish) -> None:
    publish(tmp_path, "stored", stored=True)
    stored = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    async with loaded(tmp_path) as models:
        version = models.find("stored")
        together = await version.infer(stored)
        alone = await asyncio.gather(*(version.infer(stored[index : index + 1]) for index in range(3)))
    np.testing.assert_allclose(np.concatenate(alone), together, rtol=1e-5, atol=1e-5)


async def test_engine_settings_reach_the_engines(
    loaded: Loaded, tmp_path: Path, publish: Publish, gated: list[GatedEngine]
) -> None:
    publish(tmp_path, "linear")
    settings = Settings.model_validate({"engine": {"instances": 3}, "batching": {"max_batch_size": 4}})
    async with loaded(tmp_path, settings) as models:
        assert models.find("linear").max_batch == 4
        assert len(gated) == 3


async def test_settings_do_not_raise_the_manifests_batch(loaded: Loaded, tmp_path: Path, publish: Publish) -> None:
    publish(tmp_path, "linear", max_batch=2)
    async with loaded(tmp_path, Settings.model_validate({"batching": {"max_batch_size": 64}})) as models:
        assert models.find("linear").max_batch == 2


async def test_an_empty_repository_serves_nothing(loaded: Loaded, tmp_path: Path) -> None:
    async with loaded(tmp_path) as models:
        assert models.ready
        with pytest.raises(NotFound, match="model 'linear': not served here; the models are: none"):
            models.find("linear")


async def test_a_missing_repository_is_told() -> None:
    from pathlib import Path

    with pytest.raises(FileNotFoundError, match="expected a model repository here, found no folder"):
        await Models(Path("nowhere"), Settings()).start()


@pytest.mark.parametrize("version", ["foo", "1.0", "-1", " 1", "٣", "9" * 5000])
async def test_a_version_is_a_number(loaded: Loaded, repository: Path, version: str) -> None:
    async with loaded(repository) as models:
        with pytest.raises(
            InvalidArgument,
            match="expected a whole number, an alias of the model \\(it has none\\), or nothing for the default",
        ):
            models.find("linear", version)


@pytest.mark.parametrize("name", ["../linear", "a/b", "/etc", "..", ".hidden", "a\nb", "x" * 200])
async def test_a_name_that_could_leave_the_repository(loaded: Loaded, repository: Path, name: str) -> None:
    async with loaded(repository) as models:
        with pytest.raises(NotFound, match="not served here; the models are: linear") as caught:
            models.find(name)
        assert len(str(caught.value).splitlines()) == 1
