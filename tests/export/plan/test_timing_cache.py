"""Measurements of earlier builds: kept where that is possible, and never at the cost of a build."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from export.plan import timing_cache


class Config:
    """What a builder's configuration has of timings: those of before, and one more after each build."""

    def __init__(self) -> None:
        self.content = b""

    def create_timing_cache(self, content: bytes) -> bytes:
        return b"timings " + content

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:  # noqa: FBT001 - TensorRT's own signature
        assert not ignore_mismatch
        self.content = cache
        return True

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: self.content + b"one")


def built(folder: Path) -> Config:
    """Return the configuration of a build that began and ended with this folder."""
    config = Config()
    with timing_cache.kept(config, folder, runtime="tensorrt", version="11.4"):
        pass
    return config


def test_a_build_starts_from_what_the_last_one_measured(tmp_path: Path) -> None:
    built(tmp_path / "timings")
    assert built(tmp_path / "timings").content == b"timings timings one"


def test_a_folder_that_cannot_be_written_does_not_spoil_a_build(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert built(tmp_path / "file").content == b"timings "
    assert "the timings of this build could not be kept" in caplog.text


def test_timings_that_cannot_be_read_are_measured_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    built(tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.unlink()
    # A file that nobody can read from its beginning, root included.
    kept.symlink_to("/proc/self/mem")
    assert built(tmp_path).content == b"timings "
    assert "the timings of earlier builds cannot be read" in caplog.text
    assert built(tmp_path).content == b"timings timings one"
