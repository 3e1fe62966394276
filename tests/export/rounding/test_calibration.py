from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
from onnxruntime.quantization.calibrate import HistogramCollector, MinMaxCalibrater, PercentileCalibrater

from export.graph import preparation
from export.rounding import calibration
from tests.export import networks

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from export.graph.preparation import Prepared
    from export.manifest import Method


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Hands ONNX Runtime's calibrators all images at once."""

    def __init__(self, images: NDArray[Any]) -> None:
        self._feeds = iter([{"images": images}])

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return next(self._feeds, None)


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    return preparation.prepare(networks.saved(networks.residual(), tmp_path))


def _theirs(kind: type, prepared: Prepared, images: NDArray[Any], folder: Path, **options: Any) -> dict[str, Any]:
    path = folder / "prepared.onnx"
    onnx.save(prepared.model, path)
    calibrator = kind(path, augmented_model_path=str(folder / "augmented.onnx"), **options)
    calibrator.augment_graph()
    calibrator.create_inference_session()
    calibrator.collect_data(_Reader(images))
    return dict(calibrator.compute_data().items())


def test_minima_and_maxima_are_those_of_onnxruntime(prepared: Prepared, tmp_path: Path) -> None:
    images = networks.images(40)
    theirs = _theirs(MinMaxCalibrater, prepared, images, tmp_path)
    ours = calibration.ranges(prepared.model, images, tensors=prepared.activations())
    assert ours.calibration_method == CalibrationMethod.MinMax
    assert set(ours.keys()) == set(theirs)
    for name, expected in theirs.items():
        np.testing.assert_allclose(ours[name].range_value, np.ravel(expected.range_value), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_percentiles_are_close_to_those_of_onnxruntime(prepared: Prepared, tmp_path: Path, *, symmetric: bool) -> None:
    images = networks.images(40)
    theirs = _theirs(
        PercentileCalibrater, prepared, images, tmp_path, num_bins=16_384, percentile=98.77, symmetric=symmetric
    )
    ours = calibration.ranges(
        prepared.model,
        images,
        tensors=prepared.activations(),
        method="percentile",
        percentile=98.77,
        symmetric=symmetric,
    )
    extremes = calibration.ranges(prepared.model, images, tensors=prepared.activations())
    clipped = 0
    for name, expected in theirs.items():
        limit = max(-extremes[name].lowest, extremes[name].highest)
        np.testing.assert_allclose(ours[name].range_value, np.ravel(expected.range_value), atol=1e-3 * limit)
        clipped += ours[name].highest < 0.95 * extremes[name].highest
    assert clipped > 5


@pytest.mark.parametrize("shape", ["normal", "laplace", "one-sided"])
def test_entropy_is_close_to_that_of_onnxruntime(shape: str) -> None:
    # Not equal: ONNX Runtime loses the bins that do not divide into levels, and fills bins that are empty.
    edges = np.linspace(-1, 1, 2050, dtype=np.float32)
    centres = np.abs((edges[1:] + edges[:-1]) / 2)
    density = np.exp(-((centres / 0.15) ** 2)) if shape == "normal" else np.exp(-centres / 0.08)
    counts = (1 + 1e6 * density).astype(np.int64)
    if shape == "one-sided":
        counts[: len(counts) // 2] = 1
    collector = HistogramCollector(
        "entropy", symmetric=False, num_bins=2049, num_quantized_bins=128, percentile=None, scenario=None
    )
    low, high = collector.get_entropy_threshold((counts, edges, edges[0], edges[-1], edges[-1]), 128)
    assert high < 0.9
    np.testing.assert_allclose(calibration.entropy_limit(counts), (low, high), atol=0.1)


def test_entropy_leaves_out_what_is_far_off(tmp_path: Path) -> None:
    net = networks.Network()
    lone = np.zeros((1, 3, 1, 1), np.float32)
    path = networks.saved(net.model(net.head(net.node("Add", "images", net.constant(lone)), 3)), tmp_path)
    images = np.random.default_rng(0).normal(0, 1, (64, 3, 16, 16)).astype(np.float32)
    images[0, 0, 0, 0] = 100
    prepared = preparation.prepare(path)
    (extremes, clipped) = (
        calibration.ranges(prepared.model, images, tensors=["images"], method=method)["images"]
        for method in ("minmax", "entropy")
    )
    assert extremes.highest == 100
    assert 2 < clipped.highest < 20
    assert -clipped.lowest < 20


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_ranges_do_not_depend_on_the_order_of_the_images(prepared: Prepared, method: Method) -> None:
    images = networks.images(70)
    tensors = ["images", *prepared.activations({"Conv"})]
    one, other = (
        calibration.ranges(prepared.model, given, tensors=tensors, method=method) for given in (images, images[::-1])
    )
    for name in tensors:
        np.testing.assert_allclose(one[name].range_value, other[name].range_value, rtol=1e-4, atol=1e-5)


def test_uint8_images_are_taken_as_they_are(tmp_path: Path) -> None:
    images = networks.images(8, uint8=True)
    prepared = preparation.prepare(networks.saved(networks.residual(uint8=True), tmp_path))
    ranges = calibration.ranges(prepared.model, images, tensors=prepared.activations(), method="percentile")
    assert "images" not in ranges
    assert np.isclose(ranges["t2"].highest, images.max() / 255)


@pytest.mark.parametrize("operator", ["Log", "Sqrt", "Reciprocal"])
def test_an_activation_that_is_not_finite_is_named(tmp_path: Path, operator: str) -> None:
    net = networks.Network()
    dark = net.node("Add", "images", net.constant(np.float32(-0.0 if operator == "Reciprocal" else -2.0)))
    broken = net.node(operator, dark, name="the culprit")
    path = networks.saved(net.model(net.head(net.node("Relu", broken), 3)), tmp_path)
    prepared = preparation.prepare(path)
    images = networks.images(40)
    images[33, 1, 2, 3] = 0
    with pytest.raises(ValueError, match=rf"node 'the culprit' \({operator}\): expected finite .* output 't1'"):
        calibration.ranges(prepared.model, images, tensors=prepared.activations())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (networks.images(0), "expected at least one, got none"),
        (
            networks.images(4, side=8),
            r"expected float32 of shape \(n, 3, 16, 16\) .* got float32 of shape \(4, 3, 8, 8\)",
        ),
        (networks.images(4, uint8=True), "expected float32 .* got uint8"),
        (networks.images(4)[0], "expected float32 of shape"),
        (networks.images(4).astype(np.float64), "got float64"),
    ],
)
def test_images_that_do_not_fit_are_refused(prepared: Prepared, images: NDArray[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibration.ranges(prepared.model, images, tensors=["images"])


def test_options_out_of_range_are_refused(prepared: Prepared) -> None:
    images = networks.images(2)
    with pytest.raises(ValueError, match="expected one of minmax, percentile, entropy, got 'max'"):
        calibration.ranges(prepared.model, images, tensors=["images"], method="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a number above 50"):
        calibration.ranges(prepared.model, images, tensors=["images"], method="percentile", percentile=0.9999)


_MEMORY = """
import resource, sys
from pathlib import Path
from export import calibration, preparation
from tests.export import networks
count, side, method = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
prepared = preparation.prepare(networks.saved(networks.residual(side=side, width=64), Path(sys.argv[4])))
images = networks.images(count, side=side)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
calibration.ranges(prepared.model, images, tensors=prepared.activations(), method=method)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def _mib(count: int, side: int, method: str, folder: Path) -> int:
    command = [sys.executable, "-c", _MEMORY, str(count), str(side), method, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_memory_does_not_grow_with_the_images(tmp_path: Path, method: str) -> None:
    # Held all at once, the activations of 192 images of 64 x 64 would take 3 GB, those of 4 of 256 x 256 one.
    assert _mib(192, 64, method, tmp_path) < _mib(64, 64, method, tmp_path) + 200
    assert _mib(4, 256, method, tmp_path) < 700


@given(st.floats(-1, 1), st.sampled_from([1, 3, 2049, 16_385]), st.sampled_from([1e-25, 1e-3, 1.0, 255.0, 1e30]))
def test_a_value_is_counted_in_its_bin_or_on_its_edge(share: float, bins: int, limit: float) -> None:
    counts = np.zeros(bins, np.int64)
    calibration.count_values(np.array([share * limit] * 3, np.float32), counts, limit=limit)
    (place,) = np.flatnonzero(counts)
    assert counts[place] == 3
    assert abs(place + 0.5 - (share + 1) / 2 * bins) < 0.51


def test_nothing_but_zeros_is_counted_in_the_middle() -> None:
    counts = np.zeros(5, np.int64)
    calibration.count_values(np.zeros(7, np.float32), counts, limit=0.0)
    assert counts.tolist() == [0, 0, 7, 0, 0]


@given(
    counts=st.lists(st.integers(0, 9), min_size=3, max_size=99).filter(lambda counts: len(counts) % 2 and sum(counts)),
    percentile=st.floats(50.5, 100),
    symmetric=st.booleans(),
)
def test_a_percentile_holds_its_share(counts: list[int], percentile: float, *, symmetric: bool) -> None:
    found = np.array(counts)
    low, high = calibration.percentile_limits(found, percentile=percentile, symmetric=symmetric)
    edges = np.linspace(-1, 1, len(found) + 1)
    inside = found[(edges[:-1] >= low - 1e-9) & (edges[1:] <= high + 1e-9)].sum()
    assert inside >= percentile / 100 * found.sum() - 1e-6
    assert not symmetric or low == -high
