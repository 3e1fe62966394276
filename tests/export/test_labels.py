from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
import pytest

from export import labels

if TYPE_CHECKING:
    from pathlib import Path


def _model(**metadata: str) -> onnx.ModelProto:
    model = onnx.ModelProto()
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    return model


def test_names_are_given_as_a_list_or_as_a_file(tmp_path: Path) -> None:
    assert labels.class_names("cat, dog,bird", _model(), 3) == ("cat", "dog", "bird")
    path = tmp_path / "names.txt"
    path.write_text("tench, Tinca tinca\r\ngoldfish\n\n", encoding="utf-8")
    for given in (path, str(path)):
        assert labels.class_names(given, _model(), 2) == ("tench, Tinca tinca", "goldfish")


@pytest.mark.parametrize(
    "metadata",
    [
        {"class_names": '["cat", "dog"]', "names": "{0: 'x', 1: 'y'}"},
        {"names": "{0: 'cat', 1: 'dog'}"},
        {"names": "{1: 'dog', 0: 'cat'}"},
        {"names": "['cat', 'dog']"},
    ],
)
def test_names_are_found_in_the_metadata(metadata: dict[str, str]) -> None:
    assert labels.class_names(None, _model(**metadata), 2) == ("cat", "dog")
    assert labels.class_names("a,b", _model(**metadata), 2) == ("a", "b")


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"names": "__import__('os').getcwd()"},
        {"names": "{1: 'cat', 2: 'dog'}"},
        {"names": "{0: 1}"},
        {"names": "(" * 100_000},
        {"class_names": "3"},
    ],
)
def test_without_any_names_their_number_is_named(metadata: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"labels: expected the names of 2 classes, found none.* --labels"):
        labels.class_names(None, _model(**metadata), 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a,b,c", "expected 2, as many as the model has scores, got 3"),
        ("a", "expected 2, as many as the model has scores, got 1"),
        ("a,a", "expected each name once, got 'a' more than once"),
        ("a,", "expected a name for each class, got none for class 1"),
    ],
)
def test_others_than_one_name_a_class_are_refused(given: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"labels: {message}"):
        labels.class_names(given, _model(), 2)


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"names\.txt"):
        labels.class_names("names.txt", _model(), 2)
    with pytest.raises(FileNotFoundError, match="a file of one name a line, found none"):
        labels.class_names(tmp_path / "names", _model(), 2)
    (tmp_path / "names").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="expected UTF-8 text"):
        labels.class_names(tmp_path / "names", _model(), 2)


def test_a_thousand_names_on_the_command_line_are_no_path() -> None:
    assert len(labels.class_names(",".join(map(str, range(1000))), _model(), 1000)) == 1000
