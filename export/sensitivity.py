"""Which layers a lower precision costs most, and what to keep in fp32 so that the engine is accepted again.

each layer alone in the lower precision --difference from fp32--> ranking
the whole graph, the first k of the ranking in fp32 --bisection over k--> the shortest list that is acceptable

Everything is measured by ONNX Runtime on the CPU, in this process, and with one calibration for all graphs.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float32

from export.rounding import calibration, fp16, int8

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import onnx

    from export.manifest import Method, Target
    from export.rounding.calibration import Inputs

    Logits = Float32[np.ndarray, "n classes"]
    Acceptable = Callable[[Logits, Logits], bool]
    Progress = Callable[[int, int, str], None]

# Images that each layer alone is measured on: a ranking needs no more, and there are as many graphs to run as layers.
RANKING_IMAGES = 32


@dataclass(frozen=True)
class Layer:
    """What one layer alone costs.

    Attributes:
        node: its name in the source, as `keep` takes it.
        operator: its ONNX operator.
        disagreement: the share of images, 0 to 1, whose first class is not that of fp32.
        mean_abs_difference: of the logits from those of fp32; infinite where they are not finite.
    """

    node: str
    operator: str
    disagreement: float
    mean_abs_difference: float


@dataclass(frozen=True)
class Report:
    """Which layers cost most, and what to do about them.

    Attributes:
        layers: the costliest first.
        proposal: the nodes to keep in fp32, to be given as `keep`, those that were given included; None if the graph
            is acceptable with all of its layers in fp32 alone.
        disagreement_before: the share of images, 0 to 1, whose first class is not that of fp32.
        disagreement_after: the same with the proposal; None without one.
    """

    layers: tuple[Layer, ...]
    proposal: tuple[str, ...] | None
    disagreement_before: float
    disagreement_after: float | None


def bisect(
    source: Path,
    *,
    precision: Literal["fp16", "int8"],
    inputs: Inputs,
    calibration_inputs: Inputs,
    acceptable: Acceptable,
    target: Target = "cpu",
    method: Method = "minmax",
    percentile: float = 99.99,
    keep: Sequence[str] = (),
    progress: Progress | None = None,
) -> Report:
    """Rank the layers of a graph by what a lower precision of each alone costs, and propose which to keep in fp32.

    The list proposed is the shortest beginning of the ranking found by bisection; that the graph is acceptable with
    it has been measured. The ranking is measured on the first 32 images, everything else on all.

    Args:
        source: the fp32 file.
        precision: "fp16" or "int8".
        inputs: (N, ...) images to measure on, as the graph takes them.
        calibration_inputs: (M, ...) images from which ranges come, as for `precision.int8_from_onnx`.
        acceptable: whether answers (N, classes) of a graph are near enough to those of fp32, its second argument.
        target: of int8, as the three that follow (`precision.int8_from_onnx`).
        method: how ranges are chosen.
        percentile: of method "percentile".
        keep: names of nodes that stay in fp32 anyway.
        progress: called with how many graphs have been measured, how many there will be at most, and the name of the
            layer or the number of layers kept.

    Raises:
        ValueError: as for `precision.int8_from_onnx` and `precision.fp16_from_onnx`.
    """
    maker: fp16.Converter | int8.Quantiser
    if precision == "fp16":
        maker = fp16.converter(source, inputs=calibration_inputs)
    else:
        maker = int8.quantiser(source, inputs=calibration_inputs, target=target, method=method, percentile=percentile)
    calibration.check_inputs(maker.prepared.model, inputs)
    search = _Search(maker, inputs, maker.prepared.resolved(keep), acceptable, progress)
    before = search.whole(())
    ranking = search.ranking()
    names = tuple(layer.node for layer in ranking)
    # All of them in fp32 would be no lower precision at all.
    length = bisect_left(range(len(names)), 1, key=lambda count: int(search.whole(names[:count]).accepted))
    if length == len(names):
        return Report(ranking, None, before.disagreement, None)
    after = search.whole(names[:length])
    return Report(ranking, (*search.kept, *names[:length]), before.disagreement, after.disagreement)


@dataclass(frozen=True)
class _Whole:
    """How the whole graph answers that keeps some nodes in fp32."""

    accepted: bool
    disagreement: float


class _Search:
    """Measures graphs and keeps count of them."""

    def __init__(
        self,
        maker: fp16.Converter | int8.Quantiser,
        inputs: Inputs,
        kept: tuple[str, ...],
        acceptable: Acceptable,
        progress: Progress | None,
    ) -> None:
        self.kept = kept
        self._maker = maker
        self._inputs = inputs
        self._acceptable = acceptable
        self._progress = progress
        self._candidates = maker.candidates(kept)
        # Each layer alone, the graph as it failed, and a bisection of the number of layers to keep.
        self._total = len(self._candidates) + 1 + math.ceil(math.log2(len(self._candidates) + 1))
        self._done = 0
        self._expected = answers(maker.prepared.model, inputs)
        self._measured: dict[tuple[str, ...], _Whole] = {}

    def whole(self, names: tuple[str, ...]) -> _Whole:
        """Measure the graph that keeps these nodes in fp32 beside those kept anyway, once."""
        if names not in self._measured:
            graph = self._maker.on_cpu(kept=(*self.kept, *names))
            given = answers(graph, self._inputs, optimise=self._maker.optimise)
            self._measured[names] = _Whole(self._acceptable(given, self._expected), disagreement(given, self._expected))
            self._step(f"{len(names)} layers in fp32")
        return self._measured[names]

    def ranking(self) -> tuple[Layer, ...]:
        """Measure each layer alone and sort them, the costliest first."""
        layers = []
        for node in self._candidates:
            layers.append(self._alone(node))
            self._step(node.name)
        return tuple(sorted(layers, key=lambda layer: -layer.mean_abs_difference))

    def _alone(self, node: onnx.NodeProto) -> Layer:
        expected = self._expected[:RANKING_IMAGES]
        graph = self._maker.on_cpu(only=(node.name,))
        given = answers(graph, self._inputs[:RANKING_IMAGES], optimise=self._maker.optimise)
        difference = float(np.abs(given.astype(np.float64) - expected).mean())
        return Layer(
            node.name,
            node.op_type,
            disagreement(given, expected),
            difference if math.isfinite(difference) else math.inf,
        )

    def _step(self, name: str) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total, name)


def fp16_answers(source: Path, *, inputs: Inputs, calibration_inputs: Inputs, keep: Sequence[str] = ()) -> Logits:
    """Return what the fp16 version of a file answers where activations are fp16, as on a GPU.

    ONNX Runtime's CPU provider computes a fp16 file in fp32: there rounding and overflow do not show.

    Args:
        source: the fp32 file.
        inputs: (N, ...) images as the graph takes them.
        calibration_inputs: those that `precision.fp16_from_onnx` was given.
        keep: the nodes that it was given.

    Raises:
        ValueError: as for `precision.fp16_from_onnx`.
    """
    converter = fp16.converter(source, inputs=calibration_inputs)
    calibration.check_inputs(converter.prepared.model, inputs)
    return answers(converter.on_cpu(kept=converter.prepared.resolved(keep)), inputs)


def answers(model: onnx.ModelProto, inputs: Inputs, *, optimise: bool = True) -> Logits:
    """Run a graph over images (N, ...), fused by ONNX Runtime or as it stands, and return its answers (N, classes)."""
    session = calibration.open_session(model, optimise=optimise)
    (name,) = (value.name for value in session.get_inputs())
    output = model.graph.output[0].name
    return np.concatenate([session.run([output], {name: batch})[0] for batch in calibration.batches(inputs)])


def disagreement(given: Logits, expected: Logits) -> float:
    """Return the share of images, 0 to 1, whose first class differs; one of no number has none."""
    same = (given.argmax(1) == expected.argmax(1)) & np.isfinite(given).all(1)
    return float(1 - same.mean())
