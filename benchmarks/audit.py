"""What an audit's attacks cost, as ratios to others in one run: PGD, AutoAttack, black-box attacks, and how it grows.

    python benchmarks/audit.py [--run FOLDER --images FOLDER] [--threads 1] [--only descent black-box suite cost]

network, engine, images that it classifies correctly -> the epsilon at which PGD leaves 60 % -> in turns, each a round:
    descent      a plain torch loop | Foolbox | ours | ours with each iterate decided on the engine
    black-box    images a second that Square and HopSkipJump ask about | the engine's own, in its largest batch
    suite        APGD-CE, APGD-T, FAB-T and Square on the engine | torchattacks' AutoAttack, with --peers
    cost         seconds over images, steps and workers, with --out a plot

Without --run the network is a ResNet-20 of random weights that tells made-up photographs apart. Ratios are of
neighbours in a round; what else the machine does meets both alike. On one thread of a CPU, seconds are those that the
processor gave to this program, but for several workers, whose seconds are those on the wall.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import foolbox
import torch

from benchmarks import audit_attacks as attacks
from benchmarks.audit_subject import prepared_subject
from benchmarks.hardware import hardware

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.audit_subject import Subject

T = TypeVar("T")

SECTIONS = ("descent", "black-box", "suite", "cost")
TARGETS = {
    "ours / plain loop": 1.4,
    "ours / Foolbox": 1.9,
    "ours, decided on the engine / plain loop": 1.2,
    "Square / engine": 0.85,
    "HopSkipJump / engine": 0.85,
    "ours / torchattacks": 1.3,
}


def main() -> None:
    """Print a table for each question, and the hardware."""
    given = _arguments()
    torch.set_num_threads(given.threads)
    if given.peers:
        # A virtual environment's packages may be laid beside its other files.
        sys.path += [str(given.peers), str(given.peers / "site")]
    with warnings.catch_warnings():
        # Foolbox warns of its own deprecated imports.
        warnings.simplefilter("ignore")
        with prepared_subject(given) as opened:
            subject = replace(opened, epsilon=opened.epsilon or attacks.epsilon_of(opened))
            n = len(subject.labels)
            print(f"{subject.name}, {n} images, epsilon {255 * subject.epsilon:.2f}/255, {given.rounds} rounds")
            for section in given.only:
                PRINTED[section](subject, given)
    clock = "the processor's seconds" if given.threads == 1 else "seconds on the wall"
    print(
        f"on {given.threads} threads, {clock}; {hardware()}, PyTorch {torch.__version__}, foolbox {foolbox.__version__}"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a training run; by default random weights")
    parser.add_argument("--images", type=Path, help="a folder of class folders, of the run's classes")
    parser.add_argument("--samples", type=int, default=256, help="images that are attacked")
    parser.add_argument("--epsilon", type=float, help="in [0, 1]; by default that at which PGD leaves 60 %%")
    parser.add_argument("--threads", type=int, default=1, help="of torch, and of the engine")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each number, after one to warm up")
    parser.add_argument("--queries", type=int, default=1000, help="an image, of the black-box attacks")
    parser.add_argument("--suite-samples", type=int, default=64, help="images of the suite, which is slow")
    parser.add_argument("--workers", type=int, nargs="+", default=(1, 2), help="processes, of the table of costs")
    parser.add_argument("--peers", type=Path, help="a folder with torchattacks")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="tables to print")
    parser.add_argument("--out", type=Path, help="PNG file for a plot of the costs")
    parser.add_argument("--quick", action="store_true", help="one round, few images: does it run?")
    given = parser.parse_args()
    if given.run and not given.images:
        parser.error("--run: expected --images, too; give a folder of its classes' folders")
    if given.quick:
        given.rounds, given.samples, given.queries, given.suite_samples = 1, 32, 200, 4
    return given


def _print_descent(subject: Subject, given: argparse.Namespace) -> None:
    contenders: dict[str, Callable[[Subject], attacks.Done]] = {
        "plain loop": attacks.attack_plain,
        "plain loop, network prepared": lambda subject: attacks.attack_plain(subject, network=subject.source),
        "Foolbox": attacks.attack_foolbox,
        "ours": attacks.attack_ours,
        "ours, decided on the engine": attacks.attack_decided,
    }
    rows = _rounds(lambda: {name: attack(subject) for name, attack in contenders.items()}, given.rounds)
    n = len(subject.labels)
    print(f"\ndescent, PGD-{attacks.STEPS}: images a second, and robust accuracy")
    for name in contenders:
        _print_spread(name, [n / row[name].seconds for row in rows], form=".1f", after=f"{rows[0][name].robust:.3f}")
    print("ratios of images a second")
    seconds = [{name: done.seconds for name, done in row.items()} for row in rows]
    for name in list(contenders)[1:]:
        _print_spread(f"{name} / plain loop", [row["plain loop"] / row[name] for row in seconds])
    for name in list(contenders)[3:]:
        _print_spread(f"{name} / Foolbox", [row["Foolbox"] / row[name] for row in seconds])


def _print_black_box(subject: Subject, given: argparse.Namespace) -> None:
    rows = _rounds(lambda: attacks.black_box(subject, queries=given.queries), given.rounds)
    print(f"\nblack-box: images a second on {subject.target.name}, about {given.queries} queries an image")
    for name in rows[0]:
        _print_spread(name, [row[name] for row in rows], form=".0f")
    for name in list(rows[0])[1:]:
        _print_spread(f"{name} / engine", [row[name] / row["engine"] for row in rows])


def _print_suite(subject: Subject, given: argparse.Namespace) -> None:
    few = subject.first(given.suite_samples)
    steps, queries = (5, 20) if given.quick else (100, attacks.SQUARE_QUERIES)
    print(f"\nsuite of {steps} steps and {queries} queries on {len(few.labels)} images, one round")
    done = {"ours": attacks.suite(few, steps=steps, queries=queries)}
    if given.peers and not given.quick:
        done["torchattacks"] = attacks.suite_of_torchattacks(few)
    for name, (seconds, robust) in done.items():
        print(f"  {name:<45} {f'{seconds:.1f} s':>28}   {robust:.3f}")
    if "torchattacks" in done:
        _print_spread("ours / torchattacks", [done["torchattacks"].seconds / done["ours"].seconds])


def _print_cost(subject: Subject, given: argparse.Namespace) -> None:
    n = len(subject.labels)
    series: dict[str, dict[int, list[float]]] = {
        "images": {
            count: _times(lambda count=count: attacks.cost(subject.first(count), steps=attacks.STEPS), given.rounds)  # type: ignore[misc]
            for count in sorted({max(n // share, 1) for share in (8, 4, 2, 1)})
        },
        "steps": {
            steps: _times(lambda steps=steps: attacks.cost(subject, steps=steps), given.rounds)  # type: ignore[misc]
            for steps in (attacks.STEPS // 4, attacks.STEPS // 2, attacks.STEPS)
        },
        "workers": {
            count: _times(lambda count=count: attacks.cost_of_workers(subject, workers=count), given.rounds)  # type: ignore[misc]
            for count in given.workers
        },
    }
    print(
        f"\ncost of PGD, seconds, otherwise {n} images, {attacks.STEPS} steps; workers without the engine, on the wall"
    )
    for name, line in series.items():
        for value, seconds in line.items():
            _print_spread(f"{value} {name}", seconds, form=".2f")
    if given.out is not None:
        _plot(series, given.out)
        print(f"plot: {given.out}")


PRINTED: dict[str, Callable[[Subject, argparse.Namespace], None]] = {
    "descent": _print_descent,
    "black-box": _print_black_box,
    "suite": _print_suite,
    "cost": _print_cost,
}


def _plot(series: dict[str, dict[int, list[float]]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - only this table needs it
    from matplotlib.figure import Figure  # noqa: PLC0415 - as above

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (name, line) in zip(figure.subplots(1, len(series)), series.items(), strict=True):
        panel.plot(list(line), [statistics.median(seconds) for seconds in line.values()], marker="o")
        panel.fill_between(list(line), [min(s) for s in line.values()], [max(s) for s in line.values()], alpha=0.3)
        panel.set(xlabel=name, xticks=list(line))
        panel.set_ylim(bottom=0)
    figure.axes[0].set_ylabel("seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _rounds(measure: Callable[[], T], rounds: int) -> list[T]:
    return [measure() for _ in range(rounds + 1)][1:]  # the first one warms up


def _times(measure: Callable[[], float], rounds: int) -> list[float]:
    return [measure() for _ in range(rounds)]


def _print_spread(name: str, values: Sequence[float], *, form: str = ".3f", after: str = "") -> None:
    low, middle, high = min(values), statistics.median(values), max(values)
    after = f"at least {TARGETS[name]:.2f}" if name in TARGETS else after
    spread = f"{middle:{form}} ({low:{form}} to {high:{form}})"
    print(f"  {name:<45} {spread:>28}   {after}", flush=True)


if __name__ == "__main__":
    main()
