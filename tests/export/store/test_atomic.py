from __future__ import annotations

from pathlib import Path

import pytest

from export.store import atomic


def test_a_write_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    for content in (b"first", b"second"):
        atomic.write(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_a_write_that_fails_leaves_the_earlier_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    atomic.write(tmp_path / "file", b"first")

    def full(path: Path) -> None:
        raise OSError(f"no space left for {path}")

    monkeypatch.setattr(atomic, "flush", full)
    with pytest.raises(OSError, match="no space left"):
        atomic.write(tmp_path / "file", b"second")
    assert (tmp_path / "file").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_staged_file_is_there_only_once_it_is_put(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    place = tmp_path / "folder" / "file"
    with atomic.staged(place, b"content", folder=tmp_path) as put:
        assert list((tmp_path / "folder").iterdir()) == []
        (waiting,) = (path for path in tmp_path.iterdir() if path.is_file())
        assert waiting.name.startswith(atomic.PREFIX)
        put()
        assert place.read_bytes() == b"content"
    with atomic.staged(place, b"other", folder=tmp_path):
        pass
    assert place.read_bytes() == b"content"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
