"""The names of a classifier's classes: given, or found in the metadata of an ONNX file.

"a,b,c" | file of one a line | metadata "class_names" (ours), "names" (Ultralytics') --> as many names as scores
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

# Characters: ImageNet-21k's names have 600 thousand; a parser of Python must not meet what is much longer.
_LONGEST = 1 << 22


def class_names(labels: str | Path | None, model: onnx.ModelProto, count: int) -> tuple[str, ...]:
    """Return the names of a model's classes in the order of its scores.

    Args:
        labels: names with commas between them, or a text file of one name a line (by name or as a Path); None looks
            into the model's metadata.
        model: whose metadata may hold them: "class_names" as JSON, or Ultralytics' "names", a dict in Python.
        count: how many scores the model gives.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: there are none, or others than `count`, or two are the same.
    """
    if labels is not None:
        return check(given(labels), count=count)
    found = _stored({entry.key: entry.value for entry in model.metadata_props})
    if found is None:
        raise ValueError(
            f"labels: expected the names of {count} classes, found none in the file's metadata; "
            "give them as --labels a,b,c or as a file of one name a line"
        )
    return check(found, count=count)


def check(names: tuple[str, ...], *, count: int) -> tuple[str, ...]:
    """Return names that are as many as a model's scores, each once; raise a ValueError for others."""
    if len(names) != count:
        raise ValueError(
            f"labels: expected {count}, as many as the model has scores, got {len(names)}; give one name a class, "
            "in the order of the scores"
        )
    if "" in names:
        raise ValueError(f"labels: expected a name for each class, got none for class {names.index('')}; name it")
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise ValueError(f"labels: expected each name once, got {twice[0]!r} more than once; tell the classes apart")
    return names


def given(labels: str | Path) -> tuple[str, ...]:
    """Return the names that a text "a,b,c" or a file of one name a line gives; raises as `class_names`."""
    path = Path(labels)
    if isinstance(labels, Path) or _is_file(path):
        return _lines(path)
    if "," not in labels and (path.suffix or "/" in labels):
        raise FileNotFoundError(f"labels: expected names with commas between them, or a file: {labels!r} is not there")
    return tuple(name.strip() for name in labels.split(","))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        # Names of a thousand classes are too long for the name of a file.
        return False


def _lines(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        raise FileNotFoundError(f"labels: {path}: expected a file of one name a line, found none; check the path")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"labels: {path}: expected UTF-8 text, got other bytes; is it the right file?") from error
    return tuple(line.strip() for line in text.rstrip().splitlines())


def _stored(metadata: dict[str, str]) -> tuple[str, ...] | None:
    if "class_names" in metadata:
        return _as_names(_parsed(metadata["class_names"]))
    if "names" in metadata:
        return _as_names(_parsed(metadata["names"]))
    return None


def _parsed(text: str) -> Any:
    """Return what a text of JSON, or else of Python's literals, stands for; None for others."""
    if len(text) > _LONGEST:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def _as_names(value: Any) -> tuple[str, ...] | None:
    if isinstance(value, dict) and sorted(value, key=str) == sorted(range(len(value)), key=str):
        value = [value[index] for index in range(len(value))]
    if isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value):
        return tuple(name.strip() for name in value)
    return None
