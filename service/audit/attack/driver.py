"""Run an entry of a plan against a target: every part, gradient source and epsilon, on what is not fooled yet.

entry --parts--> each part, each source --> each epsilon, ascending --> chunks of open rows --> attack
                                                                                |-- asks by SearchModel --> Search
                                                                                '-- result --propose----------^
The search keeps the nearest success of all of them, so that the union over sources and members comes by itself.
"""

from __future__ import annotations

import math
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from foolbox import distances
from foolbox.attacks.base import FixedEpsilonAttack, MinimizationAttack
from foolbox.criteria import Misclassification

from service.audit.attack import catalogue
from service.audit.attack.answering import FirstSuccessModel, SurrogateModel
from service.audit.attack.disagreement import Differs
from service.audit.attack.model import SearchModel
from service.audit.attack.pool import Pool
from service.audit.attack.search import TOLERANCE, BudgetSpent, Search
from service.audit.attack_tables import DisagreementAttack, SuiteAttack, epsilon_value

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from jaxtyping import Float32, Float64, Int64
    from torch import Tensor

    from service.audit.attack.catalogue import Part, Reference
    from service.audit.gradient.source import Source
    from service.audit.plan import Attack
    from service.audit.target.base import Target

# Bytes that the images of a chunk may take, with all that an attack keeps of them.
_CHUNK_BYTES = 2 << 30
# How many times its own bytes an image takes: a ResNet-50's activations are 150 images large, and what an attack
# without gradients keeps is a few.
_WITH_GRADIENTS, _WITHOUT_GRADIENTS = 200, 16
# More images at once are no faster.
_LARGEST_CHUNK = 512

# Halvings of the way to an image of another class: 2^-10 of it is less than a grey level.
_BISECTIONS = 10

# Perturbations that rounding has undone are tried again, so many times as large.
_STRETCHES = (1.02, 1.05, 1.1, 1.25, 1.5, 2.0, 3.0)

# Rounding to grey levels adds an error of variance step^2 / 12 to each value; a tenth more, as it varies.
_ROUNDING_VARIANCE = 1.1 / 12

_DISTANCES = {"linf": distances.linf, "l2": distances.l2, "l1": distances.l1, "l0": distances.l0}


@dataclass(frozen=True)
class _Work:
    """What one part does with one source of gradients.

    Attributes:
        part: of the entry.
        search: keeps what is found.
        source: of gradients; None without.
        pool: other images, to start from.
        transfer: whether the source stands for the target until the end.
        every: whether the target decides at every iterate.
        seed: of this part.
    """

    part: Part
    search: Search
    source: Source | None
    pool: Pool
    transfer: bool
    every: bool
    seed: tuple[int, ...]

    def model(self, rows: Int64[Tensor, " k"]) -> SearchModel:
        """Return what the attack sees."""
        kind = SurrogateModel if self.transfer else FirstSuccessModel if self.part.first else SearchModel
        return kind(self.search, rows, source=self.source, every=self.every)

    def chunks(self, rows: Int64[Tensor, " k"]) -> Iterator[Int64[Tensor, " l"]]:
        """Cut rows to what memory holds."""
        size = self.search.images[:1].numel() * self.search.images.element_size()
        size *= _WITH_GRADIENTS if self.part.gradients else _WITHOUT_GRADIENTS
        yield from torch.split(rows, min(_LARGEST_CHUNK, max(1, _CHUNK_BYTES // size))) if len(rows) else ()


def search_of(
    entry: Attack,
    target: Target,
    images: Float32[Tensor, "n c h w"],
    labels: Int64[Tensor, " n"],
    *,
    reference: Target | None = None,
    reference_source: Source | None = None,
) -> tuple[Search, Reference | None]:
    """Return the search that an entry of the plan makes, and the second engine if it is after disagreement.

    Args:
        entry: of the plan.
        target: what is attacked.
        images: clean, in [0, 1].
        labels: true classes.
        reference: the engine that may disagree.
        reference_source: of its gradients.

    Raises:
        ValueError: the reference does not do the same task.
    """
    if not isinstance(entry, DisagreementAttack):
        return Search(target, images, labels, norm=entry.norm, budget=entry.budget), None
    assert reference is not None, "a plan with Disagreement has a reference"
    differs = Differs(target, reference, n=len(images))
    search = Search(target, images, labels, norm=entry.norm, budget=entry.budget, goal=differs)
    return search, catalogue.Reference(differs, reference_source)


def run(
    entry: Attack,
    search: Search,
    *,
    sources: Sequence[Source] = (),
    generator_seed: int,
    pool: Pool | Float32[Tensor, "m c h w"],
    surrogates: Mapping[str, Source] | None = None,
    reference: Reference | None = None,
) -> dict[str, Float64[Tensor, " n"]]:
    """Attack the images of a search, which has not begun; what is found stands in the search.

    Args:
        entry: of the plan; its norm is the search's.
        search: as `search_of` makes it.
        sources: of the target's gradients, each taken in turn.
        generator_seed: of every random choice, at least 0.
        pool: other images in [0, 1], among which a decision-based attack finds where to start from; a `Pool` is asked
            about once for several runs.
        surrogates: other models by the names that the plan has for them, for transfer attacks.
        reference: of `search_of`.

    Returns:
        For each part - a member of a suite, a source of gradients, or both - the distances (n,) that it was the first
        to come down to; 0 where none is needed, inf where it improved on nothing.

    Raises:
        ValueError: an attack with gradients has no source; nothing has been asked then.
        TargetFailed: the target died; the search has what was found before.
    """
    parts = catalogue.parts(entry, reference=reference)
    works = [
        (_name(part, source, suite=isinstance(entry, SuiteAttack)), part, source)
        for part in parts
        for source in _sources(entry, part, sources, surrogates or {})
    ]
    search.begin()
    wrong, found = search.fooled(0.0), {}
    for number, (name, part, source) in enumerate(works):
        before = search.distances.clone()
        work = _Work(
            part=part,
            search=search,
            source=source,
            pool=pool if isinstance(pool, Pool) else Pool(search.target, pool),
            transfer=entry.access == "transfer",
            every=entry.access == "transfer" or getattr(entry, "decisions", "iterates") == "iterates",
            seed=(generator_seed, number),
        )
        _run(work, sorted(map(epsilon_value, entry.epsilons)), suite=isinstance(entry, SuiteAttack))
        found[name] = search.distances.where(wrong | (search.distances < before), torch.inf)
    return found


def unrounded(entry: Attack, search: Search) -> Float64[Tensor, " n"] | None:
    """Return a search's `unrounded` distances, if they say anything.

    Args:
        entry: of the plan.
        search: that `run` is done with.

    Returns:
        None if nothing is rounded; if nothing can tell what the target would answer to other images, as without a
        source of its gradients, or to both engines of a disagreement; or if the queries ended before a result.
    """
    if search.target.domain.step == 0 or entry.access != "white-box" or isinstance(entry, DisagreementAttack):
        return None
    return search.unrounded if (search.looked_at | search.fooled(0.0)).all() else None


def _sources(
    entry: Attack, part: Part, sources: Sequence[Source], surrogates: Mapping[str, Source]
) -> Sequence[Source | None]:
    """Return whose gradients a part takes, in turn."""
    if not part.gradients:
        return [None]
    if entry.access == "transfer":
        name = entry.surrogate
        if name is None or name not in surrogates:
            raise ValueError(f"attacks.{entry.id}: expected the surrogate {name!r}, got {sorted(surrogates)}; open it")
        return [surrogates[name]]
    if not sources:
        raise ValueError(
            f"attacks.{entry.id}: a white-box attack needs gradients, and this target has none; export it with its "
            "checkpoint or its ONNX file, or take an attack by scores or decisions"
        )
    return sources


def _name(part: Part, source: Source | None, *, suite: bool) -> str:
    if source is None:
        return part.name
    return f"{part.name} {source.name}" if suite else source.name


def _run(work: _Work, epsilons: Sequence[float], *, suite: bool) -> None:
    # The class says what kind of attack it is; which one it is made with does not matter.
    if isinstance(work.part.make(_generator(work.seed)), FixedEpsilonAttack):
        for place, epsilon in enumerate(epsilons):
            _within(work, epsilon, seed=(*work.seed, place))
    else:
        # Of a suite, what was fooled within the smallest epsilon already needs no smaller perturbation.
        rows = work.search.open(epsilons[0] if suite else None)
        for chunk in work.chunks(rows):
            _minimise(work, chunk, seed=(*work.seed, int(chunk[0])))


def _within(work: _Work, epsilon: float, *, seed: tuple[int, ...]) -> None:
    """Attack within one epsilon, and propose results of which what is sent keeps to it."""
    search = work.search
    reach = _reach(epsilon, search)
    if reach == 0:  # not a grey level: nothing but the image itself can be sent
        return
    for number in range(work.part.rounds):
        rows = search.open(epsilon)
        if len(rows) == 0:
            return
        for chunk in work.chunks(rows):
            with _seeded((*seed, number, int(chunk[0]))) as generator:
                attack = work.part.make(generator)
                result = _result(work, attack, chunk, epsilon=reach)
            if result is not None:
                clipped = _DISTANCES[search.norm].clip_perturbation(search.images[chunk], result, reach)
                _propose(work, chunk, _fitting(search, chunk, clipped, epsilon=epsilon), epsilon=epsilon)


def _minimise(work: _Work, rows: Int64[Tensor, " k"], *, seed: tuple[int, ...]) -> None:
    """Look for the smallest perturbation; where rounding undoes it, propose it somewhat larger."""
    search = work.search
    with _seeded(seed) as generator:
        attack, options = work.part.make(generator), {}
        if work.part.starts:
            rows, starts = _starts(work, rows)
            options = {"starting_points": starts}
        result = _result(work, attack, rows, **options) if len(rows) else None
    if result is None:
        return
    _propose(work, rows, result)
    if search.target.domain.step == 0 or not isinstance(attack, MinimizationAttack):
        return
    change = result - search.images[rows]
    size = _size(search, rows, result)
    for factor in _STRETCHES:
        left = (size > 0) & (search.distances[rows] > factor * size)
        _propose(work, rows[left], search.images[rows[left]] + factor * change[left], note=False)


def _result(work: _Work, attack: Any, rows: Int64[Tensor, " k"], **options: Any) -> Float32[Tensor, "k c h w"] | None:
    """Return what an attack proposes, on the CPU; None if it ended because the queries are spent."""
    device = torch.device("cpu") if work.source is None else work.source.device
    inputs, labels = work.search.images[rows].to(device), work.search.labels[rows].to(device)
    options = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    try:
        with warnings.catch_warnings():
            # Foolbox warns of its own deprecated imports, and where noise finds nothing.
            warnings.simplefilter("ignore")
            result: Tensor = attack.run(work.model(rows), inputs, Misclassification(labels), **options)
    except BudgetSpent:
        return None
    except ValueError as error:
        # Of a target whose answers vary: Foolbox's boundary attack wants all starts to fool it once more.
        if not (work.part.starts and "not adversarial" in str(error)):
            raise
        return None
    return result.detach().cpu()


def _propose(
    work: _Work,
    rows: Int64[Tensor, " k"],
    candidates: Float32[Tensor, "k c h w"],
    *,
    epsilon: float | None = None,
    note: bool = True,
) -> None:
    """Propose results to the search; of an attack within epsilon, those of images that are not fooled."""
    source = work.source

    @torch.no_grad()
    def answers(images: Float32[Tensor, "k c h w"]) -> Float32[Tensor, "k classes"]:
        assert source is not None
        return source(images.to(source.device))

    if work.search.target.domain.step == 0 and epsilon is not None:
        # What a decision at an iterate has settled needs no second one.
        left = ~work.search.fooled(epsilon)[rows]
        rows, candidates = rows[left], candidates[left]
    own = note and work.part.errs and source is not None and not work.transfer
    work.search.propose(rows, candidates, unrounded=answers if own else None)


def _reach(epsilon: float, search: Search) -> float:
    """Return how far an attack may go so that its images, rounded to what can be sent, are within epsilon."""
    step = search.target.domain.step
    if step == 0:
        return epsilon
    if search.norm == "linf":
        return math.floor(epsilon / step + TOLERANCE) * step
    rounding = _ROUNDING_VARIANCE * step**2 * search.images[0].numel()
    if search.norm == "l2" and rounding < epsilon**2 / 2:
        return math.sqrt(epsilon**2 - rounding)
    return epsilon


def _fitting(
    search: Search, rows: Int64[Tensor, " k"], candidates: Float32[Tensor, "k c h w"], *, epsilon: float
) -> Float32[Tensor, "k c h w"]:
    """Return candidates, shortened where what is sent would otherwise be further away than epsilon."""
    if search.target.domain.step == 0 or search.norm == "linf":
        return candidates
    clean = search.images[rows]
    low, high = torch.zeros(len(rows)), torch.ones(len(rows))
    fits = _size(search, rows, search.target.domain.sent(candidates)) <= epsilon
    for _ in range(_BISECTIONS):
        share = (low + high) / 2
        shorter = clean + share[:, None, None, None] * (candidates - clean)
        inside = _size(search, rows, search.target.domain.sent(shorter)) <= epsilon
        low, high = low.where(~inside, share), high.where(inside, share)
    return torch.where(fits[:, None, None, None], candidates, clean + low[:, None, None, None] * (candidates - clean))


def _size(search: Search, rows: Int64[Tensor, " k"], candidates: Float32[Tensor, "k c h w"]) -> Float32[Tensor, " k"]:
    size: Tensor = _DISTANCES[search.norm](search.images[rows], candidates)
    return size


def _starts(work: _Work, rows: Int64[Tensor, " k"]) -> tuple[Int64[Tensor, " l"], Float32[Tensor, "l c h w"]]:
    """Return images next to the decision boundary, on the way to the nearest of the pool in another class.

    Returns:
        The rows that have one - the others have nowhere to start from - and an adversarial start for each.
    """
    search, sent = work.search, work.search.target.domain.sent
    pool, classes = work.pool.images, work.pool.classes
    apart = torch.cdist(search.images[rows].flatten(1), pool.flatten(1))
    apart[search.labels[rows][:, None] == classes[None, :]] = torch.inf
    nearest, chosen = apart.min(dim=1)
    rows, far = rows[nearest.isfinite()], pool[chosen[nearest.isfinite()]]
    near = search.images[rows]
    try:
        for _ in range(_BISECTIONS if len(rows) else 0):
            middle = sent((near + far) / 2)
            fooled = torch.ne(search.ask(rows, middle).argmax(dim=1), search.labels[rows])[:, None, None, None]
            near, far = torch.where(fooled, near, middle), torch.where(fooled, middle, far)
        # A target whose answers vary may think otherwise of the boundary the next time.
        kept = torch.ne(search.ask(rows, far).argmax(dim=1), search.labels[rows])
    except BudgetSpent:
        return rows[:0], far[:0]
    return rows[kept], far[kept]


def _generator(seed: tuple[int, ...]) -> torch.Generator:
    return torch.Generator().manual_seed(_number(seed))


def _number(seed: tuple[int, ...]) -> int:
    """Return one number of a path of numbers; 63 bits, as torch wants it."""
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def _seeded(seed: tuple[int, ...]) -> Iterator[torch.Generator]:
    """Give a generator, and seed what Foolbox draws from; the caller's random numbers are left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(_number(seed))
        yield _generator(seed)
