"""An entry of a plan -> the Foolbox attacks that it stands for: Foolbox's own, or ours where those fall short.

[[attacks]] table --parts--> Part (one, or the members of a suite) --make(generator)--> foolbox.Attack
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from foolbox import attacks as foolbox_attacks
from foolbox import distances

from service.audit import attack_tables as tables
from service.audit.attack import apgd, descent, disagreement, fab, hop_skip_jump, square
from service.audit.attack.spatial import SpatialAttack

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    import eagerpy as ep
    import foolbox
    import torch

    from service.audit.attack.disagreement import Differs
    from service.audit.attack.model import Source
    from service.audit.plan import Attack

# The names of ours for noise that Foolbox draws once for each image; the driver repeats it.
_NOISE = {"LinfUniformNoise": "LinfAdditiveUniformNoiseAttack", "L2GaussianNoise": "L2AdditiveGaussianNoiseAttack"}
_DISTANCES = {"linf": distances.linf, "l2": distances.l2, "l1": distances.l1, "l0": distances.l0}
_CHANNEL_AXIS = 1

# The targeted DLR loss compares with the third and the fourth logit (Croce and Hein, 2020, equation 7).
_DLR_CLASSES = 4


@dataclass(frozen=True)
class Reference:
    """The second engine of a search for disagreement.

    Attributes:
        differs: the search's goal.
        source: of the reference's gradients; None without any.
    """

    differs: Differs
    source: Source | None = None


@dataclass(frozen=True)
class Part:
    """An attack of an entry.

    Attributes:
        name: unique in the entry.
        make: builds it; all its random choices come from the generator.
        gradients: whether it takes any.
        rounds: how often it runs, on what has not been fooled yet.
        starts: whether it has to be given adversarial images to start from.
        first: whether an image's first success is the end of its search.
        errs: whether it is after errors, so that a source can tell what a result would do without rounding.
    """

    name: str
    make: Callable[[torch.Generator], foolbox.Attack]
    gradients: bool = False
    rounds: int = 1
    starts: bool = False
    first: bool = False
    errs: bool = True


class LinfAdditiveUniformNoiseAttack(foolbox_attacks.LinfAdditiveUniformNoiseAttack):
    """Foolbox's, with noise that keeps to epsilon below zero too: it is scaled by its largest absolute value."""

    def get_epsilons(self, x: ep.Tensor, p: ep.Tensor, epsilon: float, min_: float, max_: float) -> ep.Tensor:
        """Return the factor that makes noise p as large as epsilon."""
        return super().get_epsilons(x, p.abs(), epsilon, min_, max_)


def check(entry: Attack, *, classes: int, image_shape: tuple[int, int, int]) -> None:
    """Check that an entry can be run at all, before anything is spent.

    Args:
        entry: of the plan.
        classes: of the target.
        image_shape: (channels, height, width).

    Raises:
        ValueError: an epsilon is too large for such images, there are too few classes, or a package is missing.
    """
    tables.check_size(entry, image_shape=image_shape)
    targeted = isinstance(entry, tables.SuiteAttack) or entry.name in {"LinfAPGDT", "L2APGDT"}
    if targeted and classes < _DLR_CLASSES:
        raise ValueError(
            f"attacks.{entry.id}: the targeted DLR loss needs at least {_DLR_CLASSES} classes, got {classes}; "
            "take LinfAPGD, LinfFABT and LinfSquare, or those of L2"
        )
    if isinstance(entry, tables.BrendelBethgeAttack) and find_spec("numba") is None:
        raise ValueError(
            f"attacks.{entry.id}: {entry.name} needs the package numba, which is not installed; install it, or take "
            "BoundaryAttack or an FMN attack"
        )


def parts(entry: Attack, *, reference: Reference | None = None) -> tuple[Part, ...]:
    """Return what an entry stands for, in the order in which it is run.

    Args:
        entry: of the plan.
        reference: needed by a search for disagreement.
    """
    match entry:
        case tables.SuiteAttack():
            return _standard(entry.norm)
        case tables.DisagreementAttack():
            assert reference is not None, "a plan with Disagreement has a reference"
            return (_disagreement(entry, reference),)
        case tables.NoiseAttack() | tables.SingleNoiseAttack():
            return (_noise(entry),)
    make = _OWN.get(type(entry), _foolbox)
    return (
        Part(
            entry.name,
            lambda generator: make(entry, generator),
            gradients=entry.access in {"white-box", "transfer"},
            starts=isinstance(entry, _FROM_THE_OUTSIDE),
            first=isinstance(entry, _ALONG_A_LINE),
        ),
    )


_FROM_THE_OUTSIDE = tables.DecisionAttack | tables.HopSkipJumpAttack | tables.BrendelBethgeAttack
_ALONG_A_LINE = tables.BlurAttack | tables.ContrastLineAttack


def _standard(norm: str) -> tuple[Part, ...]:
    """Return AutoAttack's standard protocol: 100 steps, one start, 9 target classes, 5,000 queries."""
    prefix = {"linf": "Linf", "l2": "L2"}[norm]
    members: dict[str, ModuleType] = {"APGD": apgd, "APGDT": apgd, "FABT": fab, "Square": square}
    return tuple(
        Part(f"{prefix}{member}", _maker(_kind(f"{prefix}{member}", module)), gradients=module is not square)
        for member, module in members.items()
    )


def _maker(kind: Callable[..., foolbox.Attack]) -> Callable[[torch.Generator], foolbox.Attack]:
    return lambda generator: kind(generator=generator)


def _disagreement(entry: tables.DisagreementAttack, reference: Reference) -> Part:
    gradients = entry.access == "white-box"

    def make(generator: torch.Generator) -> foolbox.Attack:
        return disagreement.Disagreement(
            reference.differs,
            norm=entry.norm,
            reference_source=reference.source if gradients else None,
            steps=entry.steps,
            queries=entry.queries,
            generator=generator,
        )

    return Part(entry.name, make, gradients=gradients, errs=False)


def _noise(entry: tables.NoiseAttack | tables.SingleNoiseAttack) -> Part:
    name = _NOISE.get(entry.name, entry.name).replace("Repeated", "")
    kind = LinfAdditiveUniformNoiseAttack if name.startswith("Linf") else _kind(name, foolbox_attacks)
    rounds = entry.repeats if isinstance(entry, tables.NoiseAttack) else 1
    return Part(entry.name, lambda _generator: kind(), rounds=rounds)


def _kind(name: str, *places: ModuleType) -> Callable[..., foolbox.Attack]:
    """Return the class of that name, from the first module that has it."""
    found: Callable[..., foolbox.Attack] = next(getattr(place, name) for place in places if hasattr(place, name))
    return found


def _foolbox(entry: Any, _generator: torch.Generator) -> foolbox.Attack:
    """Return the attack of that name: with an active set where there is one, else as it is in Foolbox."""
    options = entry.options()
    restarts = options.pop("restarts", 1)
    attack = _kind(entry.name, descent, foolbox_attacks)(**options)
    return attack.repeat(restarts) if restarts > 1 else attack


def _projected(entry: tables.GradientAttack, generator: torch.Generator) -> foolbox.Attack:
    # 2.5 epsilon / steps lets an iterate cross the ball from any start (Madry et al., 2018).
    size = entry.rel_stepsize or 2.5 / entry.steps
    return _foolbox(entry.model_copy(update={"rel_stepsize": size}), generator)


def _auto_gradient(entry: tables.AutoGradientAttack, generator: torch.Generator) -> foolbox.Attack:
    return _kind(entry.name, apgd)(generator=generator, **entry.options())


def _fab(entry: tables.BoundaryProjectionAttack, generator: torch.Generator) -> foolbox.Attack:
    return _kind(entry.name, fab)(generator=generator, **entry.options())


def _square(entry: tables.SquareAttack, generator: torch.Generator) -> foolbox.Attack:
    return _kind(entry.name, square)(
        queries=entry.steps, share=entry.p_init, restarts=entry.restarts, generator=generator
    )


def _hop_skip_jump(entry: tables.HopSkipJumpAttack, generator: torch.Generator) -> foolbox.Attack:
    return hop_skip_jump.HopSkipJumpAttack(norm=entry.norm, generator=generator, **entry.options())


def _spatial(entry: tables.SpatialAttack, generator: torch.Generator) -> foolbox.Attack:
    return SpatialAttack(generator=generator, **entry.options())


def _boundary(entry: tables.DecisionAttack, _generator: torch.Generator) -> foolbox.Attack:
    return foolbox_attacks.BoundaryAttack(tensorboard=False, **entry.options())


def _measured(entry: Any, _generator: torch.Generator) -> foolbox.Attack:
    """Return an attack of Foolbox's that works in any norm."""
    return _kind(entry.name, foolbox_attacks)(distance=_DISTANCES[entry.norm], **entry.options())


def _by_channel(entry: Any, _generator: torch.Generator) -> foolbox.Attack:
    """Return an attack of Foolbox's that has to know where the channels are."""
    distance = {"distance": _DISTANCES[entry.norm]} if isinstance(entry, tables.BlurAttack) else {}
    return _kind(entry.name, foolbox_attacks)(channel_axis=_CHANNEL_AXIS, **distance, **entry.options())


# What is not made by its name and its parameters alone.
_OWN: dict[type, Callable[[Any, torch.Generator], foolbox.Attack]] = {
    tables.GradientAttack: _projected,
    tables.AutoGradientAttack: _auto_gradient,
    tables.BoundaryProjectionAttack: _fab,
    tables.SquareAttack: _square,
    tables.HopSkipJumpAttack: _hop_skip_jump,
    tables.SpatialAttack: _spatial,
    tables.DecisionAttack: _boundary,
    tables.BlendedNoiseAttack: _measured,
    tables.ContrastSearchAttack: _measured,
    tables.ContrastLineAttack: _measured,
    tables.InversionAttack: _measured,
    tables.BlurAttack: _by_channel,
    tables.SaltAndPepperAttack: _by_channel,
}
