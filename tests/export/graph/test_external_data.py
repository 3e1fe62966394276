from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from export import onnx_file

_SIZE = 4 * 2 * 3 * 4 * 4


@pytest.fixture
def model() -> onnx.ModelProto:
    """A classifier whose kernel lies in `weights.bin`, its first four bytes being somebody else's."""
    parsed = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20]>
        net (float[N, 3, 4, 4] image) => (float[N, 2] scores)
        <float[2, 3, 4, 4] kernel>
        {
            features = Conv <kernel_shape: ints = [4, 4]> (image, kernel)
            scores = Flatten (features)
        }
    """)
    del parsed.graph.initializer[:]
    kernel = parsed.graph.initializer.add(name="kernel", dims=(2, 3, 4, 4), data_type=onnx.TensorProto.FLOAT)
    kernel.data_location = onnx.TensorProto.EXTERNAL
    return parsed


def _point(model: onnx.ModelProto, **entries: str) -> None:
    kernel = model.graph.initializer[0]
    del kernel.external_data[:]
    for key, value in entries.items():
        kernel.external_data.add(key=key, value=value)


def _saved(model: onnx.ModelProto, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def _weights() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 3, 4, 4), np.float32)


@pytest.mark.parametrize("location", ["weights.bin", "below/weights.bin", "./weights.bin", "link.bin"])
@pytest.mark.parametrize("length", [str(_SIZE), None])
def test_data_in_the_folder_is_folded_into_the_model(
    model: onnx.ModelProto, tmp_path: Path, location: str, length: str | None
) -> None:
    _point(model, location=location, offset="4", **({} if length is None else {"length": length}))
    path = _saved(model, tmp_path / "in")
    (path.parent / "below").mkdir()
    for name in ("weights.bin", "below/weights.bin"):
        (path.parent / name).write_bytes(b"else" + _weights().tobytes())
    (path.parent / "link.bin").symlink_to("below/weights.bin")
    loaded = onnx_file.load(path)
    (kernel,) = loaded.graph.initializer
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(kernel), _weights())
    onnx_file.write(loaded, tmp_path / "alone.onnx")
    assert onnx_file.load(tmp_path / "alone.onnx") == loaded


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("../outside.bin", "inside the model's folder, got '../outside.bin'"),
        ("below/../../outside.bin", "inside the model's folder"),
        ("/etc/hostname", "inside the model's folder, got '/etc/hostname'"),
        ("C:\\weights.bin", "inside the model's folder"),
        ("", "inside the model's folder, got ''"),
        ("link.bin", "'link.bin' is a link that leads out of the model's folder"),
        ("linked/outside.bin", "is a link that leads out"),
        ("below", "'below' is no regular file"),
    ],
)
def test_data_outside_the_folder_is_never_read(
    model: onnx.ModelProto, tmp_path: Path, location: str, message: str
) -> None:
    (tmp_path / "outside.bin").write_bytes(_weights().tobytes())
    _point(model, location=location)
    path = _saved(model, tmp_path / "in")
    (path.parent / "below").mkdir()
    (path.parent / "link.bin").symlink_to(tmp_path / "outside.bin")
    (path.parent / "linked").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="external data of 'kernel': .*" + re.escape(message)):
        onnx_file.load(path)


def test_a_missing_file_is_named(model: onnx.ModelProto, tmp_path: Path) -> None:
    _point(model, location="model.onnx_data")
    with pytest.raises(FileNotFoundError, match=r"'kernel': expected a file 'model\.onnx_data' beside the model"):
        onnx_file.load(_saved(model, tmp_path))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"offset": "8", "length": str(_SIZE)}, f"expected {_SIZE} bytes from 8 on in 'weights.bin', which has"),
        ({"offset": "4000"}, "expected 0 bytes from 4000 on"),
        ({"offset": "-4"}, "expected a number of bytes, got '-4'"),
        ({"length": "many"}, "expected a number of bytes, got 'many'"),
        ({"length": "9" * 5000}, "expected a number of bytes"),
        ({"length": "8"}, "constant 'kernel' cannot be read"),
    ],
)
def test_slices_that_do_not_fit_are_refused(
    model: onnx.ModelProto, tmp_path: Path, entries: dict[str, str], message: str
) -> None:
    _point(model, location="weights.bin", **entries)
    (tmp_path / "weights.bin").write_bytes(b"else" + _weights().tobytes())
    with pytest.raises(ValueError, match=message):
        onnx_file.load(_saved(model, tmp_path))


def test_more_than_two_gib_in_all_are_refused_before_they_are_read(model: onnx.ModelProto, tmp_path: Path) -> None:
    for index in range(3):
        tensor = model.graph.initializer.add(name=f"w{index}", dims=(1 << 28,), data_type=onnx.TensorProto.FLOAT)
        tensor.CopyFrom(tensor)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="weights.bin")
    _point(model, location="weights.bin", length=str(_SIZE))
    with (tmp_path / "weights.bin").open("wb") as file:
        # A file of holes: it takes no room on the disk.
        file.truncate(1 << 30)
    with pytest.raises(ValueError, match=r"expected at most 2\.00 GiB of external data, got 3\.00 GiB"):
        onnx_file.load(_saved(model, tmp_path))
