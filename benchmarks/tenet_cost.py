"""What TENET costs: the parts of its step, its ratio to ordinary training and to the published order of work.

    python benchmarks/tenet_cost.py [--quick] [--device cuda] [--threads 1] [--only shares ratios published scaling]

images -> a few ordinary iterations, so that maps are those of a network that learns -> in turns, each a round:
    shares       body | analysis | grouping | reversed map | masked pass | backward pass and optimiser
    ratios       ordinary iteration | TENET step | fused iteration | exact TENET step
    published    our TENET step | one written as Liu et al.'s code: loops over samples and groups, two whole passes
    scaling      grouping and reversed map, over batch sizes, channels and map sizes

Labels are the classes that the network predicts, so that each image is classified correctly and the TENET step is of
the whole batch, which is the most that it can cost; in training it is of the correctly classified images alone.
Ratios are of neighbours in a round; what else the machine does meets both alike. On one thread of a CPU, seconds are
those that the processor gave to this program, otherwise those on the wall.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.hardware import hardware
from training import grouping, inhibition, models, recipe
from training.inhibition import TenetStep

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")


class Shape(NamedTuple):
    """That of square maps."""

    batch: int
    channels: int
    side: int  # pixels


Row = dict[str, float]  # seconds by name, of one round

CLASSES = 10
SIZE = 32  # pixels a side, as CIFAR's
GROUPS = 6
INTERVAL = 3  # ordinary iterations to a TENET step
PUBLISHED_SHIFT = 1e-2  # of all centres in a round, below which the published code stops
PUBLISHED_BATCH = 16  # loops over the samples of more would show the same, later
TARGETS = {
    "TENET step / ordinary": 1.35,
    "epoch at interval 3 / ordinary": 1.45,
    "fused / ordinary": 1.6,
    "grouping and reversed map": 0.10,
}
NETWORKS: dict[str, tuple[recipe.Model, str]] = {
    "ResNeXt-29 (4x32d)": (recipe.ResNeXt(name="resnext"), "stage_2"),
    "ResNet-20": (recipe.ResNet(), "layer2"),
}
BASE = Shape(batch=64, channels=512, side=16)  # the maps of ResNeXt-29 at stage_2, for CIFAR's images
AXES = {"batch": (16, 32, 64, 128, 256), "channels": (64, 128, 256, 512, 1024), "pixels a side": (4, 8, 16, 32)}


@dataclass(frozen=True, eq=False)
class Training:
    """A network that has begun to learn, and images that it classifies as labelled."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    images: Tensor
    labels: Tensor
    stage: str

    def tenet(self, *, exact: bool = False) -> TenetStep:
        """Return the TENET step of the network."""
        return TenetStep(self.model, stage=self.stage, groups=GROUPS, exact=exact)

    def lower(self, loss: Tensor) -> None:
        """Take one step of the optimiser."""
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def begun(settings: recipe.Model, stage: str, *, batch: int, steps: int, device: torch.device) -> Training:
    """Train a network on textures for a few iterations; its rate is then nothing, and rounds are alike."""
    generator = torch.Generator().manual_seed(0)
    model = models.build(settings, classes=CLASSES).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        labels = torch.randint(CLASSES, (batch,), generator=generator)
        images = textures(labels, generator=generator).to(device)
        loss = functional.cross_entropy(model(images), labels.to(device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    images = textures(torch.randint(CLASSES, (batch,), generator=generator), generator=generator).to(device)
    with torch.no_grad():
        labels = model(images).argmax(1)
    return Training(model, optimizer, images, labels, stage)


def textures(labels: Tensor, *, generator: torch.Generator) -> Tensor:
    """Return smooth random images in [0, 1], with a stripe where the class says."""
    smooth = functional.interpolate(torch.rand(len(labels), 3, 6, 6, generator=generator), SIZE, mode="bilinear")
    images = (smooth + 0.1 * torch.randn(len(labels), 3, SIZE, SIZE, generator=generator)).clamp(0, 1)
    rows = torch.arange(SIZE) // (SIZE // CLASSES) == labels[:, None]
    return torch.where(rows[:, None, :, None], 1 - images, images)


def timed(work: Callable[[], T], *, device: torch.device) -> tuple[T, float]:
    """Return the result of some work, and the seconds that it took on the device."""
    clock = time.process_time if _counts_processor_time(device) else time.perf_counter
    _wait(device)
    began = clock()
    result = work()
    _wait(device)
    return result, clock() - began


def _counts_processor_time(device: torch.device) -> bool:
    """Say whether the processor's own seconds are all: on one thread, and then other programs add little to them."""
    return device.type == "cpu" and torch.get_num_threads() == 1


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def shares(training: Training, *, device: torch.device) -> Row:
    """Take one TENET step as `TenetStep.loss` does, and time its parts."""
    tenet, labels, row = training.tenet(), training.labels, {}

    def part(name: str, work: Callable[[], T]) -> T:
        result, row[name] = timed(work, device=device)
        return result

    features: Tensor = part("body", lambda: tenet.body(training.images))
    maps, groups, variant = features.detach(), tenet.groups, tenet.variant
    with inhibition.evaluating(tenet.head):
        gradients = part(
            "analysis: gradient through the head",
            lambda: inhibition.analysis_gradients(maps, labels, head=tenet.head, variant=variant),
        )
    ids, _ = part("grouping", lambda: grouping.group_channels(maps, groups))
    mask = part(
        "importance and reversed map",
        lambda: inhibition.reversed_map(maps, gradients, ids, groups=groups, variant=variant),
    )
    loss = part(
        "masked pass of the head",
        lambda: inhibition.masked_loss(
            features,
            labels,
            mask=mask,
            group_ids=ids,
            groups=groups,
            head=tenet.head,
            lambda_tenet=tenet.lambda_tenet,
            lambda_orth=tenet.lambda_orth,
        ),
    )
    part("backward pass and optimiser", lambda: training.lower(loss))
    return row


def rounds_until_stable(training: Training) -> int:
    """Return how many rounds the grouping of the whole batch takes."""
    tenet = training.tenet()
    with torch.no_grad():
        maps = tenet.body(training.images)
    initial = grouping.random_subset(len(maps), maps.shape[1], GROUPS, generator=None)
    _, stable = grouping.group_channels(maps, GROUPS, initial=initial)
    for rounds in range(1, 50):
        _, centres = grouping.group_channels(maps, GROUPS, initial=initial, max_rounds=rounds)
        if torch.equal(centres, stable):
            return rounds
    return 50


def iterations(training: Training, *, device: torch.device) -> Row:
    """Time one of each kind of iteration."""
    tenet, exact = training.tenet(), training.tenet(exact=True)
    images, labels = training.images, training.labels

    def ordinary() -> Tensor:
        return functional.cross_entropy(training.model(images), labels)

    def fused() -> Tensor:
        features = tenet.body(images)
        loss = functional.cross_entropy(tenet.head(features), labels)
        return loss + tenet.fused_loss(features, labels)

    losses: dict[str, Callable[[], Tensor]] = {
        "ordinary": ordinary,
        "TENET step": lambda: tenet.loss(images, labels),
        "fused": fused,
        "exact TENET step": lambda: exact.loss(images, labels),
    }
    return {
        name: timed(lambda loss=loss: training.lower(loss()), device=device)[1]  # type: ignore[misc]
        for name, loss in losses.items()
    }


def published_masks(maps: Tensor, gradients: Tensor, *, ids: Tensor) -> Tensor:
    """Weigh and invert the maps of each sample in turn and each group in turn."""
    masks = torch.ones_like(maps)
    for sample, gradient, groups, mask in zip(maps, gradients, ids, masks, strict=True):
        for group in range(GROUPS):
            members = groups == group
            weights = gradient[members].mean((1, 2))
            if weights.sum() > 0:
                weighted = torch.tensordot(weights, sample[members], dims=1)
                weighted = (weighted - weighted.mean()) / (weighted.std(correction=0) + inhibition.EPSILON)
                mask[members] = 1 / (1 + torch.exp(weighted))
    return masks


def published_groups(sample: Tensor, *, max_rounds: int = 50) -> Tensor:
    """Group the maps of one sample, each group in turn; no two groups have one centre."""
    maps = sample.flatten(1)
    centres = torch.randperm(len(maps))[:GROUPS].tolist()
    for _ in range(max_rounds):
        ids, before = _distances(maps, maps[centres]).argmin(1), list(centres)
        for group in range(GROUPS):
            distances = _distances(maps, maps[ids == group].mean(0, keepdim=True))[:, 0]
            while int(distances.argmin()) in centres[:group]:
                distances[distances.argmin()] = torch.inf
            centres[group] = int(distances.argmin())
        if (maps[centres] - maps[before]).norm(dim=1).sum() < PUBLISHED_SHIFT:
            break
    return ids


def _distances(maps: Tensor, others: Tensor) -> Tensor:
    return (maps[:, None] - others).square().sum(2)


def published_orthogonality(features: Tensor, ids: Tensor) -> Tensor:
    """Return the mean product of the groups' mean maps, of each sample in turn."""
    total = features.new_zeros(())
    for sample, groups in zip(features, ids, strict=True):
        means = torch.stack([sample[groups == group].mean(0).flatten() for group in groups.unique()])
        pairs = max(len(means) * (len(means) - 1) / 2, 1)
        total = total + (means @ means.T).abs().triu(1).sum() / pairs
    return total / len(features)


def against_published(training: Training, *, device: torch.device) -> Row:
    """Time our TENET step and one in the published order, and in each what grouping and reversed map take."""
    ours, parts = training.tenet(), shares(training, device=device)
    images, labels, row = training.images, training.labels, {}
    _, row["our step"] = timed(lambda: training.lower(ours.loss(images, labels)), device=device)
    row["our grouping and map"] = parts["grouping"] + parts["importance and reversed map"]

    def masked(maps: Tensor) -> tuple[Tensor, Tensor]:
        assert maps.grad is not None
        ids = torch.stack([published_groups(sample) for sample in maps.detach()])
        return ids, published_masks(maps.detach(), maps.grad, ids=ids)

    def theirs() -> Tensor:
        with inhibition.evaluating(training.model):
            maps = ours.body(images)
            maps.retain_grad()
            chosen = ours.head(maps).gather(1, labels[:, None])
            chosen.sigmoid().sum().backward()  # through the body, too, as published
        (ids, masks), row["their grouping and map"] = timed(lambda: masked(maps), device=device)
        features = ours.body(images)
        loss = ours.lambda_tenet * functional.cross_entropy(ours.head(masks * features), labels)
        return loss + ours.lambda_orth * published_orthogonality(features, ids)

    _, row["their step"] = timed(lambda: training.lower(theirs()), device=device)
    return row


def scaling(shape: Shape, *, device: torch.device) -> float:
    """Return the seconds of grouping and reversed map on random maps of a shape."""
    batch, channels, side = shape
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(batch, channels, 4, 4, generator=generator)
    maps = functional.interpolate(coarse, side, mode="bilinear").relu().to(device)
    gradients = torch.randn(batch, channels, 1, 1, generator=generator).to(device).expand_as(maps)

    def work() -> Tensor:
        ids, _ = grouping.group_channels(maps, GROUPS, generator=generator)
        return inhibition.reversed_map(maps, gradients, ids, groups=GROUPS, variant="published")

    return timed(work, device=device)[1]


def main() -> None:
    """Print a table for each question, and the hardware."""
    given = _arguments()
    device = torch.device(given.device)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    if "shares" in given.only or "ratios" in given.only:
        for name in NETWORKS:
            _print_network(name, given, device=device)
    if "published" in given.only:
        _print_published(given, device=device)
    if "scaling" in given.only:
        _print_scaling(given, device=device)
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        clock = "the processor's seconds" if _counts_processor_time(device) else "seconds on the wall"
        where = f"CPU, {torch.get_num_threads()} threads, {clock}"
    print(f"on {where}; {hardware()}, PyTorch {torch.__version__}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU; by default as many as it chooses")
    parser.add_argument("--batch", type=int, help="images a batch; by default 256 on a GPU and 64 on the CPU")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each number, after one to warm up")
    parser.add_argument("--steps", type=int, default=8, help="iterations that a network learns first")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="tables to print")
    parser.add_argument("--out", type=Path, help="PNG file for a plot of the last table")
    parser.add_argument("--quick", action="store_true", help="one round, small batches: does it run?")
    given = parser.parse_args()
    if given.batch is None:
        given.batch = 256 if given.device.startswith("cuda") else 64
    if given.quick:
        given.rounds, given.steps, given.batch = 1, 1, 8
    return given


SECTIONS = ("shares", "ratios", "published", "scaling")


def _print_network(name: str, given: argparse.Namespace, *, device: torch.device) -> None:
    settings, stage = NETWORKS[name]
    training = begun(settings, stage, batch=given.batch, steps=given.steps, device=device)
    print(f"\n{name}, batch {given.batch}, stage {stage}, n = {given.rounds} rounds, {given.steps} iterations learned")
    if "shares" in given.only:
        rows = _rounds(lambda: shares(training, device=device), given.rounds)
        print(f"share of a TENET step; grouping is stable after {rounds_until_stable(training)} rounds")
        totals = [sum(row.values()) for row in rows]
        for part in rows[0]:
            _print_spread(part, [row[part] / total for row, total in zip(rows, totals, strict=True)])
        ours = [row["grouping"] + row["importance and reversed map"] for row in rows]
        _print_spread("grouping and reversed map", [own / total for own, total in zip(ours, totals, strict=True)])
    if "ratios" in given.only:
        rows = _rounds(lambda: iterations(training, device=device), given.rounds)
        seconds = statistics.median(row["ordinary"] for row in rows)
        print(f"ratio to an ordinary iteration, whose median is {seconds:.3f} s")
        for kind in list(rows[0])[1:]:
            _print_spread(f"{kind} / ordinary", [row[kind] / row["ordinary"] for row in rows])
        epochs = [1 + row["TENET step"] / row["ordinary"] / INTERVAL for row in rows]
        _print_spread("epoch at interval 3 / ordinary", epochs)


def _print_published(given: argparse.Namespace, *, device: torch.device) -> None:
    name = next(iter(NETWORKS))
    settings, stage = NETWORKS[name]
    batch = min(PUBLISHED_BATCH, given.batch)
    training = begun(settings, stage, batch=given.batch, steps=given.steps, device=device)
    training = replace(training, images=training.images[:batch], labels=training.labels[:batch])
    rows = _rounds(lambda: against_published(training, device=device), given.rounds)
    print(
        f"\n{name}, batch {batch}, n = {given.rounds} rounds; grouping is stable after {rounds_until_stable(training)}"
    )
    print("a step written as the published code, in loops over samples and groups, as a multiple of ours")
    for part in ("step", "grouping and map"):
        _print_spread(part, [row[f"their {part}"] / row[f"our {part}"] for row in rows])
        theirs, ours = (statistics.median(row[f"{whose} {part}"] for row in rows) for whose in ("their", "our"))
        print(f"    {theirs:.3f} s and {ours:.3f} s")


def _print_scaling(given: argparse.Namespace, *, device: torch.device) -> None:
    series = {name: _series(axis, given, device=device) for axis, name in enumerate(AXES)}
    print("\ngrouping and reversed map of random maps, milliseconds, median (lowest to highest)")
    print(f"{'batch':>6} {'channels':>9} {'map':>8} {'milliseconds':>30}")
    for line in series.values():
        for (batch, channels, side), seconds in line.items():
            low, middle, high = (1e3 * value for value in _spread(seconds))
            print(f"{batch:>6} {channels:>9} {f'{side}x{side}':>8} {f'{middle:.1f} ({low:.1f} to {high:.1f})':>30}")
    if given.out is not None:
        _plot(series, given.out)
        print(f"plot: {given.out}")


def _series(axis: int, given: argparse.Namespace, *, device: torch.device) -> dict[Shape, list[float]]:
    """Measure along one axis of AXES, the other two as in BASE."""
    values = list(AXES.values())[axis][: 2 if given.quick else None]
    shapes = [BASE._replace(**{BASE._fields[axis]: value}) for value in values]
    rows = [[scaling(shape, device=device) for shape in shapes] for _ in range(given.rounds + 1)][1:]
    return {shape: [row[index] for row in rows] for index, shape in enumerate(shapes)}


def _plot(series: dict[str, dict[Shape, list[float]]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  # only this table needs it
    from matplotlib.figure import Figure  # noqa: PLC0415  # as above

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (panel, (name, line)) in enumerate(zip(figure.subplots(1, 3, sharey=True), series.items(), strict=True)):
        lows, middles, highs = zip(
            *([1e3 * value for value in _spread(seconds)] for seconds in line.values()), strict=True
        )
        values = [shape[axis] for shape in line]
        panel.plot(values, middles, marker="o")
        panel.fill_between(values, lows, highs, alpha=0.3)
        panel.set(xscale="log", yscale="log", xlabel=name, xticks=values, xticklabels=values)
        panel.minorticks_off()
    figure.axes[0].set_ylabel("milliseconds")
    figure.suptitle(
        f"grouping and reversed map; otherwise {BASE.batch} x {BASE.channels} maps of {BASE.side} x {BASE.side} pixels"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _rounds(measure: Callable[[], Row], rounds: int) -> list[Row]:
    return [measure() for _ in range(rounds + 1)][1:]  # the first one warms up


def _print_spread(name: str, values: Sequence[float]) -> None:
    low, middle, high = _spread(values)
    target = f"   at most {TARGETS[name]:.2f}" if name in TARGETS else ""
    print(f"  {name:<38} {f'{middle:.3f} ({low:.3f} to {high:.3f})':>30}{target}")


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return min(values), statistics.median(values), max(values)


if __name__ == "__main__":
    main()
