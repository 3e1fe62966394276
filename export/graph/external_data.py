"""External data -> the model itself: weights that lie in other files, read only from the model's own folder.

tensor's location, offset, length --plain file below the folder?--> bounds --all sizes summed--> bytes in the model
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

import onnx

from export.graph import onnx_parts

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class _Slice:
    """Where a tensor's bytes lie."""

    tensor: onnx.TensorProto
    path: Path
    offset: int
    length: int


def fold(model: onnx.ModelProto, folder: Path, *, limit: int) -> None:
    """Read, in place, all external data of a model into the model.

    Args:
        model: as parsed, without its external data.
        folder: the folder that the model's file lies in.
        limit: how many bytes of external data are read at most; sizes are added up before anything is read.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a location leads out of the folder or to no regular file, a slice exceeds its file, or there are
            more bytes than `limit`.
    """
    slices = list(_slices(model, folder))
    total = sum(part.length for part in slices)
    if total > limit:
        raise ValueError(
            f"expected at most {limit / 2**30:.2f} GiB of external data, got {total / 2**30:.2f} GiB: "
            "an ONNX model with its weights inside holds 2 GiB; take a smaller model, or store its weights as float16"
        )
    for part in slices:
        with part.path.open("rb") as file:
            file.seek(part.offset)
            part.tensor.raw_data = file.read(part.length)
        del part.tensor.external_data[:]
        part.tensor.data_location = onnx.TensorProto.DEFAULT


def _slices(model: onnx.ModelProto, folder: Path) -> Iterator[_Slice]:
    for name, tensor in onnx_parts.tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield _slice(tensor, folder, name=name)


def _slice(tensor: onnx.TensorProto, folder: Path, *, name: str) -> _Slice:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    path = _inside(folder, entries.get("location", ""), name=name)
    size = path.stat().st_size
    offset = _count(entries.get("offset", "0"), name=name)
    length = _count(entries.get("length", str(max(size - offset, 0))), name=name)
    if offset + length > size:
        raise ValueError(
            f"external data of {name!r}: expected {length} bytes from {offset} on in {path.name!r}, which has {size}; "
            "the file is truncated or of another export: copy it again"
        )
    return _Slice(tensor, path, offset, length)


def _inside(folder: Path, location: str, *, name: str) -> Path:
    """Return the regular file that a location names, which lies in the folder even when links are followed."""
    plain = PurePosixPath(location)
    if (
        not location
        or "\0" in location
        or plain.is_absolute()
        or PureWindowsPath(location).drive
        or ".." in plain.parts
    ):
        raise ValueError(
            f"external data of {name!r}: expected the path of a file inside the model's folder, got {location!r}; "
            "save the model with its data beside it"
        )
    path = (folder / location).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(
            f"external data of {name!r}: {location!r} is a link that leads out of the model's folder; "
            "put the file itself there"
        )
    if not path.exists():
        raise FileNotFoundError(
            f"external data of {name!r}: expected a file {location!r} beside the model, found none; copy it there"
        )
    if not path.is_file():
        raise ValueError(f"external data of {name!r}: {location!r} is no regular file; put the file itself there")
    return path


def _count(text: str, *, name: str) -> int:
    # isdecimal() takes other scripts' digits too; nobody's exporter writes 20 digits.
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise ValueError(f"external data of {name!r}: expected a number of bytes, got {text[:40]!r}; export it again")
    return int(text)
