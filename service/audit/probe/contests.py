"""Attacks that should be weaker or stronger than others, on the same images: who found what.

sources, images --FGSM, PGD of each source, Square, noise, at two epsilons and between--> which were fooled --> Probe
plan's own attacks --as they are, twice the steps, one restart more--------------------> which were fooled --> Probe
no sources --Square instead of PGD; the plan's own Square, twice its queries-----------> which were fooled --> Probe

Every run is a search of its own: nothing that one finds is known to another.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, permutations
from typing import TYPE_CHECKING

import torch

from service.audit import attack_tables as tables
from service.audit.attack import driver
from service.audit.attack.search import Search
from service.audit.shard import Probe

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from jaxtyping import Bool, Float32, Int64
    from torch import Tensor

    from service.audit.gradient.source import Source
    from service.audit.plan import Attack
    from service.audit.target.base import Target

# In Linf an image can become any other of the same contrast: no classifier is right there (Carlini et al., "On
# evaluating adversarial robustness", 2019, section 3.4).
LARGE = "64/255"
# Where the plan has no epsilon in Linf: that of RobustBench.
_USUAL = "8/255"
# Grey levels above black.
_WHITE = 255

# What a short attack is: PGD-20, and Square with 200 queries, tell masked gradients from others (AUDIT's table).
_STEPS = 20
_QUERIES = 200
# Where Square stands for PGD it must do within 64/255 what any attack does: the few images that are left cost little.
_MANY_QUERIES = 1000
# Whose numbers a probe is about that was made without gradients.
_SHORT_SQUARE = "a short Square"
_NOISE_DRAWS = 20

# Attacks that keep to an epsilon, and get nearer with every step; a minimisation attack stops by itself.
_STEPPING = (
    tables.GradientAttack
    | tables.IterativeAttack
    | tables.MomentumAttack
    | tables.SparseDescentAttack
    | tables.AutoGradientAttack
)


@dataclass(frozen=True)
class Field:
    """Where contests take place.

    Attributes:
        target: decides.
        images: (n, C, H, W) float32 in [0, 1].
        labels: (n,) int64.
        seed: of all runs.
    """

    target: Target
    images: Float32[Tensor, "n c h w"]
    labels: Int64[Tensor, " n"]
    seed: int

    def fooled(self, entry: Attack, *, sources: Sequence[Source] = ()) -> Bool[Tensor, " n"]:
        """Return which images an entry's attack fools within its one epsilon, clean errors among them."""
        search = Search(self.target, self.images, self.labels, norm=entry.norm, budget=entry.budget)
        driver.run(entry, search, sources=sources, generator_seed=self.seed, pool=self.images)
        return search.fooled(tables.epsilon_value(entry.epsilons[0]))


def measured(field: Field, *, sources: Sequence[Source], attacks: Sequence[Attack]) -> Iterator[Probe]:
    """Measure all contests.

    Args:
        field: target and images.
        sources: of gradients, at least one.
        attacks: of the plan.
    """
    usual, large = _epsilons(field.target, attacks)
    ladder = sorted({_halved(field.target, usual), usual, large}, key=tables.epsilon_value)
    descents = {epsilon: _descents(field, sources, epsilon) for epsilon in ladder}
    iterative = {epsilon: _union(list(descents[epsilon].values())) for epsilon in ladder}
    for epsilon in dict.fromkeys((usual, large)):
        yield from _weaker(field, epsilon, iterative[epsilon], sources=sources)
        yield from _transferred(epsilon, descents[epsilon])
    for smaller, larger in pairwise(ladder):
        yield _contest("not_monotone", iterative[smaller], iterative[larger], epsilon=larger, smaller=smaller)
    yield _left(iterative[large], classes=len(field.target.class_names))
    own = [attack for attack in attacks if isinstance(attack, _STEPPING) and attack.access == "white-box"]
    for attack in own or [_pgd(usual)]:
        yield from _longer(field, attack, sources=sources, named=bool(own))


def without_gradients(field: Field, *, attacks: Sequence[Attack]) -> Iterator[Probe]:
    """Measure what can be without gradients: Square against noise, against chance, and against twice its queries.

    Args:
        field: target and images.
        attacks: of the plan; without a Square among them, a short one is given twice its queries within 64/255.
    """
    usual, large = _epsilons(field.target, attacks)
    strong = _square(large, steps=_MANY_QUERIES)
    found = {usual: field.fooled(_square(usual)), large: field.fooled(strong)}
    for epsilon, fooled in found.items():
        yield _contest("noise_wins", field.fooled(_noise(epsilon)), fooled, epsilon=epsilon, attack=_SHORT_SQUARE)
    yield _left(found[large], classes=len(field.target.class_names), attack=_SHORT_SQUARE)
    own = [attack for attack in attacks if isinstance(attack, tables.SquareAttack)]
    for attack in own or [strong]:
        epsilon = _middle(attack.epsilons)
        budget = None if attack.budget is None else 2 * attack.budget
        entry = attack.model_copy(update={"epsilons": (epsilon,)})
        longer = entry.model_copy(update={"steps": 2 * attack.steps, "budget": budget})
        yield _contest(
            "steps_change",
            field.fooled(longer),
            field.fooled(entry) if own else found[large],
            epsilon=epsilon,
            attack=attack.id if own else _SHORT_SQUARE,
        )


def _square(epsilon: str, *, steps: int = _QUERIES) -> tables.SquareAttack:
    return tables.SquareAttack(name="LinfSquare", epsilons=(epsilon,), steps=steps)


def _noise(epsilon: str) -> tables.NoiseAttack:
    return tables.NoiseAttack(name="LinfUniformNoise", epsilons=(epsilon,), repeats=_NOISE_DRAWS)


def _middle(epsilons: Sequence[str]) -> str:
    ordered = sorted(epsilons, key=tables.epsilon_value)
    return ordered[(len(ordered) - 1) // 2]


def _pgd(epsilon: str) -> tables.GradientAttack:
    return tables.GradientAttack(name="LinfPGD", epsilons=(epsilon,), steps=_STEPS)


def _epsilons(target: Target, attacks: Sequence[Attack]) -> tuple[str, str]:
    """Return the plan's largest epsilon in Linf, of white-box attacks if there are any, and the large one."""
    linf = [attack for attack in attacks if attack.norm == "linf" and attack.name != "SpatialAttack"]
    chosen = [attack for attack in linf if attack.access == "white-box"] or linf
    sizes = [tables.epsilon_value(epsilon) for attack in chosen for epsilon in attack.epsilons]
    return _sendable(target, max(sizes, default=tables.epsilon_value(_USUAL))), LARGE


def _halved(target: Target, epsilon: str) -> str:
    return _sendable(target, tables.epsilon_value(epsilon) / 2)


def _sendable(target: Target, epsilon: float) -> str:
    """Return an epsilon as a plan has it; of 8-bit images whole grey levels, at least one."""
    if target.domain.step:
        return f"{max(1, int(epsilon * _WHITE + 1e-6))}/{_WHITE}"
    return f"{epsilon:.12f}"


def _descents(field: Field, sources: Sequence[Source], epsilon: str) -> dict[str, Bool[Tensor, " n"]]:
    return {source.name: field.fooled(_pgd(epsilon), sources=[source]) for source in sources}


def _union(found: Sequence[Bool[Tensor, " n"]]) -> Bool[Tensor, " n"]:
    return torch.stack(tuple(found)).any(dim=0)


def _weaker(field: Field, epsilon: str, iterative: Bool[Tensor, " n"], *, sources: Sequence[Source]) -> Iterator[Probe]:
    single = tables.SingleStepAttack(name="FGSM", epsilons=(epsilon,))
    yield _contest("single_step_wins", field.fooled(single, sources=sources), iterative, epsilon=epsilon)
    yield _contest("gradient_free_wins", field.fooled(_square(epsilon)), iterative, epsilon=epsilon)
    yield _contest("noise_wins", field.fooled(_noise(epsilon)), iterative, epsilon=epsilon)


def _transferred(epsilon: str, descents: dict[str, Bool[Tensor, " n"]]) -> Iterator[Probe]:
    for other, own in permutations(descents, 2):
        yield _contest("transfer_wins", descents[other], descents[own], epsilon=epsilon, attack=own)


def _longer(field: Field, attack: Attack, *, sources: Sequence[Source], named: bool) -> Iterator[Probe]:
    """Run an attack as it is, with twice the steps, and with one restart more, at the middle one of its epsilons."""
    assert isinstance(attack, _STEPPING)
    epsilon = _middle(attack.epsilons)
    own = _own(attack, sources)
    entry = attack.model_copy(update={"epsilons": (epsilon,)})
    before = field.fooled(entry, sources=own)
    for code, update in _lengthened(attack).items():
        after = field.fooled(entry.model_copy(update=update), sources=own)
        yield _contest(code, after, before, epsilon=epsilon, attack=attack.id if named else "")


def _lengthened(attack: tables.Attack) -> dict[str, dict[str, int | None]]:
    """Return what is changed for a longer run; a budget grows with it."""
    assert isinstance(attack, _STEPPING)
    budget = None if attack.budget is None else 2 * attack.budget
    longer: dict[str, dict[str, int | None]] = {"steps_change": {"steps": 2 * attack.steps, "budget": budget}}
    if isinstance(attack, tables.AutoGradientAttack) or (
        isinstance(attack, tables.GradientAttack) and attack.random_start
    ):
        longer["restarts_change"] = {"restarts": attack.restarts + 1, "budget": budget}
    return longer


def _own(attack: Attack, sources: Sequence[Source]) -> Sequence[Source]:
    wanted = getattr(attack, "gradients", "auto")
    if wanted == "auto":
        return sources[:1]
    return [source for source in sources if wanted in ("all", source.name)] or sources


def _contest(
    code: str,
    suspicious: Bool[Tensor, " n"],
    trusted: Bool[Tensor, " n"],
    *,
    epsilon: str,
    smaller: str | None = None,
    attack: str = "",
) -> Probe:
    """Return what only the first found, which should not be much, and what only the second did."""
    return Probe(
        code=code,
        attack=attack,
        count=int((suspicious & ~trusted).sum()),
        n=len(suspicious),
        details={
            "epsilon": tables.epsilon_value(epsilon),
            "found": float(suspicious.sum()),
            "trusted": float(trusted.sum()),
            "trusted_only": float((trusted & ~suspicious).sum()),
            **({} if smaller is None else {"smaller": tables.epsilon_value(smaller)}),
        },
    )


def _left(fooled: Bool[Tensor, " n"], *, classes: int, attack: str = "") -> Probe:
    return Probe(
        code="large_epsilon",
        attack=attack,
        count=int((~fooled).sum()),
        n=len(fooled),
        details={"epsilon": tables.epsilon_value(LARGE), "classes": float(classes)},
    )
