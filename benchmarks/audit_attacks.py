"""The attacks that the benchmarks of an audit compare: ours, decided by a network or on the engine, and others'.

Subject --attack--> Done: its seconds, and what it left | images a second that it asked the engine about
"""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import foolbox
import torch
from foolbox.criteria import Misclassification
from torch.nn import functional

from service.audit.attack import descent
from service.audit.attack.apgd import LinfAPGD, LinfAPGDT
from service.audit.attack.fab import LinfFABT
from service.audit.attack.hop_skip_jump import HopSkipJumpAttack
from service.audit.attack.model import SearchModel
from service.audit.attack.square import LinfSquare

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from benchmarks.audit_subject import Subject
    from service.audit.attack.search import Norm

    Row = dict[str, float]  # images a second by name, of one round

T = TypeVar("T")

STEPS = 40
ROBUST = 0.60  # of the images, after PGD-40: where ratios are measured
SQUARE_QUERIES = 5000  # an image, in AutoAttack
_STEP_SIZE = 2.5 / STEPS  # of epsilon: an iterate can cross the ball from any start (Madry et al. 2018)
_HALVINGS = 8  # of the interval that epsilon is sought in: 1 / 1000 of its first width
_WARM_UP = 2  # calls, before the engine's own throughput is measured


class Done(NamedTuple):
    """What an attack took, and what it left."""

    seconds: float
    robust: float


class Piece(NamedTuple):
    """One worker's share of an attack."""

    source: nn.Module
    images: Tensor
    labels: Tensor
    epsilon: float


def epsilon_of(subject: Subject) -> float:
    """Return the epsilon at which PGD leaves the share ROBUST of the images."""
    low, high = 0.0, 0.25
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        left = attack_ours(replace(subject, epsilon=middle)).robust
        low, high = (middle, high) if left > ROBUST else (low, middle)
    return (low + high) / 2


def attack_plain(subject: Subject, *, network: nn.Module | None = None) -> Done:
    """Attack as a plain torch loop does: all images, all steps."""
    classify, clean, epsilon = network or subject.network, subject.images, subject.epsilon

    def work() -> Tensor:
        images = (clean + torch.empty_like(clean).uniform_(-epsilon, epsilon)).clamp(0, 1)
        for _ in range(STEPS):
            images.requires_grad_()
            loss = functional.cross_entropy(classify(images), subject.labels)
            (gradients,) = torch.autograd.grad(loss, images)
            images = images.detach() + _STEP_SIZE * epsilon * gradients.sign()
            images = (clean + (images - clean).clamp(-epsilon, epsilon)).clamp(0, 1)
        return images

    found, seconds = timed(work, subject)
    return Done(seconds, subject.robust(found))


def attack_foolbox(subject: Subject) -> Done:
    """Attack as Foolbox does, with the network as it is loaded."""
    network = subject.network.requires_grad_()
    attack = foolbox.attacks.LinfPGD(steps=STEPS, rel_stepsize=_STEP_SIZE)
    return _attacked(attack, foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu"), subject)


def attack_ours(subject: Subject) -> Done:
    """Attack with our descent, decided by the network that gives the gradients."""
    model = foolbox.PyTorchModel(subject.source, bounds=(0, 1), device="cpu")
    return _attacked(descent.LinfPGD(steps=STEPS, rel_stepsize=_STEP_SIZE), model, subject)


def attack_decided(subject: Subject) -> Done:
    """Attack with our descent, each iterate decided on the engine."""
    search, rows = subject.searched(), torch.arange(len(subject.labels))
    model = SearchModel(search, rows, source=subject.source)
    attack = descent.LinfPGD(steps=STEPS, rel_stepsize=_STEP_SIZE)

    def work() -> None:
        search.propose(rows, attack.run(model, subject.images, subject.labels, epsilon=subject.epsilon))

    _, seconds = timed(work, subject)
    return Done(seconds, 1 - float(search.fooled(subject.epsilon).float().mean()))


def _attacked(attack: Any, model: foolbox.Model, subject: Subject) -> Done:
    criterion = Misclassification(subject.labels)
    found, seconds = timed(lambda: attack.run(model, subject.images, criterion, epsilon=subject.epsilon), subject)
    return Done(seconds, subject.robust(found))


def black_box(subject: Subject, *, queries: int) -> Row:
    """Return images a second: of the engine alone, and of attacks that may ask so often about each image."""
    rates = {"engine": _raw(subject, n=queries * len(subject.labels) // 4)}
    generator = torch.Generator().manual_seed(0)
    # A perturbation too small to fool anything keeps all images to the end.
    square = LinfSquare(queries=queries, generator=generator)
    tiny = replace(subject, epsilon=1e-6)
    rates["Square"] = _asked(tiny, lambda model: square.run(model, tiny.images, tiny.labels, epsilon=tiny.epsilon))
    hop = HopSkipJumpAttack(steps=max(queries // 200, 1), generator=generator)
    rates["HopSkipJump"] = _asked(
        subject, lambda model: hop.run(model, subject.images, Misclassification(subject.labels)), norm="l2"
    )
    return rates


def _raw(subject: Subject, *, n: int) -> float:
    largest = min(subject.target.max_batch, len(subject.images))
    batch = subject.images[:largest].numpy()
    for _ in range(_WARM_UP):
        subject.target(batch)
    calls = max(n // largest, 1)
    _, seconds = timed(lambda: [subject.target(batch) for _ in range(calls)], subject)
    return calls * largest / seconds


def _asked(subject: Subject, attack: Callable[[SearchModel], object], *, norm: Norm = "linf") -> float:
    search = subject.searched(norm=norm)
    before = subject.target.queries
    _, seconds = timed(lambda: attack(SearchModel(search, torch.arange(len(search)))), subject)
    return (subject.target.queries - before) / seconds


def suite(subject: Subject, *, steps: int, queries: int) -> Done:
    """Run AutoAttack's four attacks on the engine, each on the images that the ones before have left."""
    search, generator = subject.searched(), torch.Generator().manual_seed(0)
    epsilon, source = subject.epsilon, subject.source
    attacks: list[Any] = [
        LinfAPGD(steps=steps, generator=generator),
        LinfAPGDT(steps=steps, generator=generator),
        LinfFABT(steps=steps, generator=generator),
        LinfSquare(queries=queries, generator=generator),
    ]

    def work() -> None:
        for attack in attacks:
            rows = search.open(epsilon)
            if len(rows) == 0:
                break
            gradients = None if isinstance(attack, LinfSquare) else source
            limit = {} if isinstance(attack, LinfFABT) else {"epsilon": epsilon}
            model = SearchModel(search, rows, source=gradients)
            search.propose(
                rows, attack.run(model, search.images[rows], Misclassification(search.labels[rows]), **limit)
            )

    _, seconds = timed(work, subject)
    return Done(seconds, 1 - float(search.fooled(epsilon).float().mean()))


def suite_of_torchattacks(subject: Subject) -> Done:
    """Run torchattacks' port of AutoAttack, in its standard version, on the network."""
    import torchattacks  # type: ignore[import-not-found] # noqa: PLC0415 - lies in the folder of --peers

    network = subject.network.requires_grad_(requires_grad=False)
    classes = len(subject.target.class_names)
    attack = torchattacks.AutoAttack(network, norm="Linf", eps=subject.epsilon, n_classes=classes, seed=0)
    found, seconds = timed(lambda: attack(subject.images, subject.labels), subject)
    return Done(seconds, subject.robust(found))


def cost(subject: Subject, *, steps: int) -> float:
    """Return the seconds of a descent with decisions on the engine, of so many steps."""
    search, rows = subject.searched(), torch.arange(len(subject.labels))
    attack, model = (
        descent.LinfPGD(steps=steps, rel_stepsize=_STEP_SIZE),
        SearchModel(search, rows, source=subject.source),
    )
    return timed(lambda: attack.run(model, subject.images, subject.labels, epsilon=subject.epsilon), subject)[1]


def cost_of_workers(subject: Subject, *, workers: int) -> float:
    """Return the seconds on the wall of a descent whose images are shared out among processes of one thread each."""
    places = torch.arange(len(subject.labels)).tensor_split(workers)
    pieces = [Piece(subject.source, subject.images[p], subject.labels[p], subject.epsilon) for p in places]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(work_on, [piece._replace(images=piece.images[:1], labels=piece.labels[:1]) for piece in pieces])
        began = time.perf_counter()
        pool.map(work_on, pieces, chunksize=1)
        return time.perf_counter() - began


def work_on(piece: Piece) -> float:
    """Attack a worker's images, and return the share that is left."""
    torch.set_num_threads(1)
    model = foolbox.PyTorchModel(piece.source, bounds=(0, 1), device="cpu")
    attack = descent.LinfPGD(steps=STEPS, rel_stepsize=_STEP_SIZE)
    found = attack.run(model, piece.images, piece.labels, epsilon=piece.epsilon)
    return float((piece.source(found).argmax(1) == piece.labels).float().mean())


def timed(work: Callable[[], T], subject: Subject) -> tuple[T, float]:
    """Return what the work returns, and its seconds: the processor's on one thread, else those on the wall."""
    clock = time.process_time if subject.threads == 1 else time.perf_counter
    torch.manual_seed(0)
    began = clock()
    result = work()
    return result, clock() - began
