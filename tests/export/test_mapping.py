from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from export.mapping import Mapping, read_mapping

if TYPE_CHECKING:
    from pathlib import Path


def test_a_mapping_is_read_from_toml(tmp_path: Path) -> None:
    path = tmp_path / "mapping.toml"
    path.write_text("""
        input = "x"
        layout = "NHWC"
        channels = "BGR"
        range = 255
        mean = [0.4, 0.5, 1]
        image_size = [224, 192]
        dynamic_batch = true
    """)
    assert read_mapping(path) == Mapping(
        input="x",
        layout="NHWC",
        channels="BGR",
        range=255.0,
        mean=(0.4, 0.5, 1.0),
        image_size=(224, 192),
        dynamic_batch=True,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("maen = [0.5]", r"mapping\.toml: maen: unknown key; expected one of input, output, layout"),
        ('layout = "HWC"', r"mapping\.toml: layout: input should be 'NCHW' or 'NHWC'"),
        ("mean = 0.5", r"mapping\.toml: mean: "),
        ("mean = [nan]", r"mapping\.toml: mean: "),
        ("range = 0", r"mapping\.toml: range: input should be greater than 0"),
        ("std = [0.5, 0.0]", r"mapping\.toml: std: expected numbers above 0"),
        ("image_size = [0, 3]", r"mapping\.toml: image_size: expected height and width"),
        ("image_size = [3]", r"mapping\.toml: image_size"),
        ('dynamic_batch = "yes"', r"mapping\.toml: dynamic_batch"),
        ("input = 1979-05-27", r"mapping\.toml: input: "),
        ("input", r"mapping\.toml: expected TOML"),
    ],
)
def test_mistakes_are_named_by_their_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mapping.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_mapping(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.toml: expected a mapping"):
        read_mapping(tmp_path / "none.toml")
