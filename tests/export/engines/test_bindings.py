"""I/O binding, as far as it can be tried on a CPU: the arrays of the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.engines import ort
from export.engines.bindings import HostBinding
from tests.export.engines import versions
from tests.export.engines.versions import CHANNELS, HEIGHT, WIDTH

if TYPE_CHECKING:
    from pathlib import Path

SHAPE = (CHANNELS, HEIGHT, WIDTH)


def test_bound_arrays_of_any_layout_are_answered_as_they_look(tmp_path: Path) -> None:
    session = ort.open_session(versions.version(tmp_path) / "model.onnx")
    binding = HostBinding(session, versions.manifest(), ordinal=0)
    images = np.random.default_rng(0).random((5, *SHAPE), dtype=np.float32)
    for part in (images[:2], images, images[:, :, ::-1]):
        np.testing.assert_allclose(binding.run(part), versions.answers(part), rtol=1e-4, atol=1e-4)


def test_what_the_runtime_cannot_run_is_told_in_one_line(tmp_path: Path) -> None:
    # Sixty pixels an image: a single one makes no rows of seven.
    nodes = [helper.make_node("Reshape", ["images", "rows"], ["logits"], name="sevens")]
    constants = [numpy_helper.from_array(np.array([-1, 7]), "rows")]
    taken = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", *SHAPE])
    given = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", 7])
    versions.save(helper.make_graph(nodes, "sevens", [taken], [given], constants), tmp_path / "model.onnx")
    binding = HostBinding(ort.open_session(tmp_path / "model.onnx"), versions.manifest(), ordinal=0)
    with pytest.raises(RuntimeError, match=r"linear: the runtime failed: .*sevens") as told:
        binding.run(np.zeros((1, *SHAPE), np.float32))
    assert "\n" not in str(told.value)
    np.testing.assert_array_equal(binding.run(np.zeros((7, *SHAPE), np.float32)), np.zeros((60, 7)))
