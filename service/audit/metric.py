"""The numbers of a report that a gate may name: accuracy, robust_accuracy["pgd", "8/255"] and so on.

text of a gate --> Metric --check, against the plan--> Metric --assembly--> Measured
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection
    from collections.abc import Set as AbstractSet

# What a number is: a share of images, a mean over images of values in [0, 1], a median over images, or none of these.
Kind = Literal["share", "mean", "median", "curve"]


class _Form(NamedTuple):
    """How a metric is written, and what a plan must have to measure it."""

    kind: Kind
    keys: tuple[tuple[str, ...], ...] = ((),)
    attack: bool = False
    corruptions: bool = False
    reference: bool = False


_FORMS: dict[str, _Form] = {
    "accuracy": _Form("share"),
    "class_accuracy": _Form("share", keys=(("class name",),)),
    "robust_accuracy": _Form("share", keys=(("attack id", "epsilon"),), attack=True),
    "worst_case": _Form("share", keys=((), ("epsilon",)), attack=True),
    "mean_error": _Form("mean", corruptions=True),
    "disagreement": _Form("share", reference=True),
    "corrupted_disagreement": _Form("mean", corruptions=True, reference=True),
    "perturbed_disagreement": _Form("mean", keys=((), ("attack id",)), attack=True, reference=True),
    "ece": _Form("curve"),
    "median_distance": _Form("median", keys=(("attack id",),), attack=True),
}


@dataclass(frozen=True)
class Metric:
    """One number of a report.

    Attributes:
        name: "accuracy", "class_accuracy", "robust_accuracy", "worst_case" (images that survive every attack, at every
            epsilon or at one), "mean_error" (under the corruptions), "disagreement" (with the reference, on clean
            images), "corrupted_disagreement", "perturbed_disagreement" (on the images that the attacks found), "ece"
            (expected calibration error) or "median_distance" (smallest perturbations, in the attack's norm).
        key: what stands in brackets: attack id, epsilon as the plan writes it, or class name; empty without.
    """

    name: str
    key: tuple[str, ...] = ()

    def __str__(self) -> str:
        keys = ", ".join(f'"{part}"' for part in self.key)
        return f"{self.name}[{keys}]" if keys else self.name

    @property
    def kind(self) -> Kind:
        """What kind of number it is."""
        return _FORMS[self.name].kind

    def check(
        self,
        attacks: AbstractSet[tuple[str, str]],
        *,
        corruptions: bool,
        reference: bool,
        class_names: Collection[str] | None = None,
    ) -> None:
        """Check that a plan measures it.

        Args:
            attacks: the plan's pairs of attack id and epsilon.
            corruptions: whether there are any.
            reference: whether there is a reference engine.
            class_names: of the target; None while they are unknown.

        Raises:
            ValueError: it does not.
        """
        form = _FORMS[self.name]
        if form.attack and not attacks:
            raise ValueError(f"{self.name} needs an attack in the plan; add an [[attacks]] table")
        if form.corruptions and not corruptions:
            raise ValueError(f"{self.name} needs corruptions in the plan; add a [corruptions] table")
        if form.reference and not reference:
            raise ValueError(f"{self.name} needs a reference; add a [differential] table")
        if self.key and form.attack and self.key not in (known := self._keys(attacks)):
            choices = ", ".join(str(Metric(self.name, key)) for key in sorted(known))
            raise ValueError(f"expected one of {choices}, got {self}")
        if self.name == "class_accuracy" and class_names is not None and self.key[0] not in class_names:
            raise ValueError(f"expected a class of the target in {self}, one of {', '.join(class_names)}")

    def _keys(self, attacks: AbstractSet[tuple[str, str]]) -> set[tuple[str, ...]]:
        match self.name:
            case "robust_accuracy":
                return set(attacks)
            case "worst_case":
                return {(epsilon,) for _, epsilon in attacks}
        return {(attack,) for attack, _ in attacks}


def from_node(node: ast.expr) -> Metric:
    """Read a metric from a parsed expression.

    Raises:
        ValueError: there is no such metric, or something else stands in its brackets.
    """
    match node:
        case ast.Name(id=name):
            return _checked(name, ())
        case ast.Subscript(value=ast.Name(id=name), slice=ast.Tuple(elts=parts)):
            return _checked(name, tuple(map(_key_part, parts)))
        case ast.Subscript(value=ast.Name(id=name), slice=part):
            return _checked(name, (_key_part(part),))
    raise ValueError(f"expected one of the metrics {_written()}, got {ast.unparse(node)!r}")


def _key_part(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str() | int() | float() as value) if not isinstance(value, bool):
            return str(value)
    raise ValueError(f"expected a name in quotation marks in the brackets, got {ast.unparse(node)!r}")


def _checked(name: str, key: tuple[str, ...]) -> Metric:
    if name not in _FORMS:
        raise ValueError(f"expected one of the metrics {_written()}, got {name!r}")
    if len(key) not in map(len, _FORMS[name].keys):
        forms = " or ".join(str(Metric(name, keys)) for keys in _FORMS[name].keys)
        raise ValueError(f"expected {forms}, got {Metric(name, key)}")
    return Metric(name, key)


def _written() -> str:
    return ", ".join(str(Metric(name, keys)) for name, form in _FORMS.items() for keys in form.keys)
