from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from export import manifest

if TYPE_CHECKING:
    from pathlib import Path

    from export.repository import Repository


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a..b", "-x", "a b", "ä", "x" * 129, "a\n"])
def test_a_name_that_is_no_plain_folder_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected letters, digits"):
        manifest.checked_name(name)


@given(st.text())
def test_an_accepted_name_never_leaves_its_folder(name: str) -> None:
    try:
        manifest.checked_name(name)
    except ValueError:
        return
    assert "/" not in name
    assert name not in {".", ".."}


def test_a_changed_engine_file_is_refused_before_it_is_parsed(own_models: Repository) -> None:
    version = own_models.find("digits")
    path = version.folder / version.manifest.file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.onnx: expected sha256 .* as in its manifest, got"):
        manifest.verify(version.folder)


def test_a_missing_engine_file_is_named(own_models: Repository) -> None:
    version = own_models.find("digits")
    (version.folder / version.manifest.file).unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.onnx: expected a file of the version here"):
        manifest.verify(version.folder)


def test_a_damaged_manifest_names_the_key(own_models: Repository) -> None:
    version = own_models.find("digits")
    path = version.folder / manifest.FILE_NAME
    record = json.loads(path.read_text())
    record["precision"] = "fp64"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"manifest\.json: precision: "):
        manifest.read(version.folder)


def test_a_folder_without_a_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a manifest here"):
        manifest.read(tmp_path)


def test_a_manifest_that_was_edited_is_refused(own_models: Repository) -> None:
    """Such as one whose proof somebody has set to passed by hand."""
    version = own_models.find("digits")
    path = version.folder / manifest.FILE_NAME
    path.write_text(path.read_text().replace('"max_batch": 64', '"max_batch": 65'))
    with pytest.raises(ValueError, match=r"manifest\.json: its checksum is not that of its contents"):
        manifest.read(version.folder)


def test_a_manifest_survives_its_own_file(own_models: Repository) -> None:
    version = own_models.find("digits-int8")
    assert manifest.from_json(version.manifest.as_json(), source="here") == version.manifest


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"/etc/passwd": "0"}},
        {"files": {"../other": "0"}},
        {"files": {"a\\b": "0"}},
        {"twin": {"folder": "/tmp", "file": "w", "sha256": "0"}},
        {"twin": {"folder": "checkpoint", "file": "../w", "sha256": "0"}},
        {"build": {"onnx": "../source.onnx"}},
        {"build": {"log": "/tmp/build.log"}},
    ],
    ids=str,
)
def test_no_path_leads_out_of_the_version(change: dict[str, object], own_models: Repository) -> None:
    record = own_models.find("digits").manifest.model_dump(mode="json")
    with pytest.raises(ValidationError, match="expected a path below the version's folder, got"):
        manifest.Manifest.model_validate({**record, **change})


@pytest.mark.parametrize(
    "change", [{"max_batch": 0}, {"max_batch": 2**31}, {"version": 0}, {"version": 10**18}], ids=str
)
def test_numbers_are_those_that_servers_can_hold(change: dict[str, int], own_models: Repository) -> None:
    record = own_models.find("digits").manifest.model_dump(mode="json")
    with pytest.raises(ValidationError, match=next(iter(change))):
        manifest.Manifest.model_validate({**record, **change})


def test_a_manifest_from_before_there_was_preprocessing_is_the_same_to_the_byte(own_models: Repository) -> None:
    path = own_models.find("digits").folder / manifest.FILE_NAME
    old = path.read_bytes()
    assert b"preprocessing" not in old
    read = manifest.from_json(old, source="here")
    assert read.preprocessing == manifest.Preprocessing()
    assert read.as_json() == old


def test_preprocessing_travels_with_a_manifest(own_models: Repository) -> None:
    chosen = manifest.Preprocessing(resize=40, interpolation="bicubic")
    described = own_models.find("digits").manifest.model_copy(update={"preprocessing": chosen})
    assert manifest.from_json(described.as_json(), source="here").preprocessing == chosen


@pytest.mark.parametrize(
    "change", [{"resize": 7}, {"resize": 0}, {"resize": 1 << 15}, {"interpolation": "box"}, {"crop": 0.9}], ids=str
)
def test_preprocessing_that_cannot_be_done_is_refused(change: dict[str, object], own_models: Repository) -> None:
    record = own_models.find("digits").manifest.model_dump(mode="json")
    with pytest.raises(ValidationError, match=r"preprocessing|resize"):
        manifest.Manifest.model_validate({**record, "preprocessing": change})
