"""The [[attacks]] tables of a plan: one frozen class for each family of attacks; torch-free, like the plan.

table --name--> family: its own parameters, strictly checked --options()--> service.audit.attack.catalogue
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, model_validator

Norm = Literal["linf", "l2", "l1", "l0"]

# Short numbers only: an exact fraction of 1e99999999 would take for ever.
_EPSILON = re.compile(r"\d{1,6}(\.\d{1,12})?(e-\d{1,2})?(/[1-9]\d{0,6})?")
# Queries an image: more than any attack asks, and still a number that torch can hold.
_LARGEST_BUDGET = 1_000_000_000
# A model of the repository, as `Repository.parse` reads it.
_REFERENCE = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}(@[A-Za-z0-9._-]{1,128})?$"
# Of the names that do not start with their norm.
_NORMS: dict[str, Norm] = {
    "FGSM": "linf",
    "MIFGSM": "linf",
    "SpatialAttack": "linf",
    "EADAttack": "l1",
    "SparseL1DescentAttack": "l1",
}


def _epsilon_text(value: Any) -> str:
    text = str(value)
    if not _EPSILON.fullmatch(text):
        raise ValueError(f"expected a number or a fraction such as '8/255', got {text!r}")
    if epsilon_value(text) <= 0:
        raise ValueError(f"expected an epsilon above 0, in input units, got {text!r}")
    return text


def unique(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return values of which each is there once; raises ValueError otherwise."""
    if repeated := [value for value in values if values.count(value) > 1]:
        raise ValueError(f"expected each value once, got {repeated[0]!r} twice; remove one")
    return values


def epsilon_value(epsilon: str) -> float:
    """Return the size of an epsilon in input units."""
    number, _, divisor = epsilon.partition("/")
    return float(number) / float(divisor or 1)


# An epsilon keeps the form in which it was written: it is a key of the report.
Epsilon = Annotated[str, BeforeValidator(_epsilon_text)]
Steps = Annotated[int, Field(ge=1, le=100_000)]
Draws = Annotated[int, Field(ge=1, le=100_000)]
Restarts = Annotated[int, Field(ge=1, le=1000)]
# Halvings: 52 of them exhaust a double.
Halvings = Annotated[int, Field(ge=1, le=52)]
Positive = Annotated[FiniteFloat, Field(gt=0)]
NotNegative = Annotated[FiniteFloat, Field(ge=0)]
Share = Annotated[FiniteFloat, Field(gt=0, le=1)]


class Table(BaseModel):
    """A table of a plan: frozen, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class _Entry(Table):
    """What every attack has.

    Attributes:
        name: Foolbox's, or ours.
        id: unique in the plan.
        epsilons: sizes of perturbations, in the attack's norm and in input units.
        budget: queries an image may have, for all epsilons together and the clean image's among them.
        within: whether it keeps to an epsilon and looks for no smaller perturbation.
    """

    within: ClassVar[bool] = False

    name: str
    id: str = Field(default="", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    epsilons: Annotated[tuple[Epsilon, ...], AfterValidator(unique)] = Field(min_length=1)
    budget: int | None = Field(default=None, ge=1, le=_LARGEST_BUDGET)

    @model_validator(mode="before")
    @classmethod
    def _named_id(cls, table: dict[str, Any]) -> dict[str, Any]:
        return {"id": table.get("name", ""), **table} if isinstance(table, dict) else table

    def options(self) -> dict[str, Any]:
        """Return the attack's own parameters; those that are not given and have no value are left out."""
        own = [key for key in type(self).model_fields if key not in _COMMON]
        return {key: value for key in own if (value := getattr(self, key)) is not None}


class _Named(_Entry):
    """An attack that measures in the norm that its name says."""

    @property
    def norm(self) -> Norm:
        """The norm in which the attack's epsilons are measured."""
        found = re.match(r"l(inf|[012])", self.name.lower())
        return f"l{found[1]}" if found else _NORMS.get(self.name, "l2")  # type: ignore[return-value]

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        _check_bounds(self.epsilons, self.norm)
        return self


class _Choosing(_Entry):
    """An attack that measures in the norm of the plan's choice."""

    norm: Literal["linf", "l2", "l1"] = "l2"

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        _check_bounds(self.epsilons, self.norm)
        return self


class _Gradient(_Entry):
    """An attack that needs gradients.

    Attributes:
        access: whose: the target's own ("white-box"), or those of another model ("transfer").
        gradients: where the target's come from; "all" takes each source in turn.
        surrogate: the other model, "MODEL" or "MODEL@VERSION" of the repository.
        decisions: whether the target decides at every iterate, or on results only.
    """

    access: Literal["white-box", "transfer"] = "white-box"
    gradients: Literal["auto", "checkpoint", "onnx", "all"] = "auto"
    surrogate: str | None = Field(default=None, pattern=_REFERENCE)
    decisions: Literal["iterates", "results"] = "iterates"

    @model_validator(mode="after")
    def _surrogate_for_transfer(self) -> Self:
        if (self.access == "transfer") != (self.surrogate is not None):
            raise ValueError(
                "surrogate: expected a model beside access = 'transfer', and none otherwise, got "
                f"access = {self.access!r} and surrogate = {self.surrogate!r}; add one or leave the other out"
            )
        if self.access == "transfer" and self.gradients != "auto":
            raise ValueError(
                f"gradients: expected none for a transfer attack, whose surrogate has them, got {self.gradients!r}; "
                "leave it out"
            )
        return self


class SingleStepAttack(_Gradient, _Named):
    """One gradient step (Goodfellow et al., 2015)."""

    within: ClassVar[bool] = True

    name: Literal["FGSM", "FGM", "LinfFastGradientAttack", "L2FastGradientAttack", "L1FastGradientAttack"]
    random_start: bool = False


class GradientAttack(_Gradient, _Named):
    """Projected gradient descent from a random start (Madry et al., 2018)."""

    within: ClassVar[bool] = True

    name: Literal[
        "LinfPGD",
        "L2PGD",
        "L1PGD",
        "LinfProjectedGradientDescentAttack",
        "L2ProjectedGradientDescentAttack",
        "L1ProjectedGradientDescentAttack",
        "LinfAdamPGD",
        "L2AdamPGD",
        "L1AdamPGD",
    ]
    steps: Steps = 40
    # None is 2.5 epsilon / steps, which lets an iterate cross the ball from any start (Madry et al., 2018).
    rel_stepsize: Positive | None = None
    random_start: bool = True
    restarts: Restarts = 1


class IterativeAttack(_Gradient, _Named):
    """The basic iterative method (Kurakin et al., 2017)."""

    within: ClassVar[bool] = True

    name: Literal[
        "LinfBasicIterativeAttack",
        "L2BasicIterativeAttack",
        "L1BasicIterativeAttack",
        "LinfAdamBasicIterativeAttack",
        "L2AdamBasicIterativeAttack",
        "L1AdamBasicIterativeAttack",
    ]
    steps: Steps = 10
    rel_stepsize: Positive = 0.2
    random_start: bool = False


class MomentumAttack(_Gradient, _Named):
    """MI-FGSM, the iterative method with momentum (Dong et al., 2018)."""

    within: ClassVar[bool] = True

    name: Literal[
        "MIFGSM",
        "LinfMomentumIterativeFastGradientMethod",
        "L2MomentumIterativeFastGradientMethod",
        "L1MomentumIterativeFastGradientMethod",
    ]
    steps: Steps = 10
    rel_stepsize: Positive = 0.2
    random_start: bool = False
    momentum: NotNegative = 1.0


class SparseDescentAttack(_Gradient, _Named):
    """Sparse L1 descent (Tramèr and Boneh, 2019)."""

    within: ClassVar[bool] = True

    name: Literal["SparseL1DescentAttack"]
    steps: Steps = 10
    rel_stepsize: Positive = 0.2
    random_start: bool = False
    quantile: Annotated[FiniteFloat, Field(ge=0, le=1)] = 0.99


class VirtualAttack(_Gradient, _Named):
    """Virtual adversarial perturbations (Miyato et al., 2015)."""

    within: ClassVar[bool] = True

    name: Literal["VirtualAdversarialAttack"]
    steps: Steps = 10
    xi: Positive = 1e-6


class DeepFoolAttack(_Gradient, _Named):
    """DeepFool (Moosavi-Dezfooli et al., 2016)."""

    name: Literal["LinfDeepFoolAttack", "L2DeepFoolAttack"]
    steps: Steps = 50
    candidates: Annotated[int, Field(ge=2, le=1000)] = 10
    overshoot: NotNegative = 0.02
    loss: Literal["logits", "crossentropy"] = "logits"


class CarliniWagnerAttack(_Gradient, _Named):
    """The L2 attack of Carlini and Wagner (2017)."""

    name: Literal["L2CarliniWagnerAttack"]
    binary_search_steps: Halvings = 9
    # Foolbox's 10,000 are for a network of which nothing is known; it stops early where the loss no longer falls.
    steps: Steps = 1000
    stepsize: Positive = 0.01
    confidence: NotNegative = 0.0
    initial_const: Positive = 1e-3
    abort_early: bool = True


class ElasticNetAttack(_Gradient, _Named):
    """EAD, the elastic-net attack (Chen et al., 2018)."""

    name: Literal["EADAttack"]
    binary_search_steps: Halvings = 9
    steps: Steps = 1000
    initial_stepsize: Positive = 0.01
    confidence: NotNegative = 0.0
    initial_const: Positive = 1e-3
    regularization: NotNegative = 0.01
    decision_rule: Literal["EN", "L1"] = "EN"
    abort_early: bool = True


class DecoupledAttack(_Gradient, _Named):
    """DDN, decoupled direction and norm (Rony et al., 2019)."""

    name: Literal["DDNAttack"]
    steps: Steps = 100
    init_epsilon: Positive = 1.0
    gamma: Share = 0.05


class MinimumNormAttack(_Gradient, _Named):
    """FMN, the fast minimum-norm attack (Pintor et al., 2021)."""

    name: Literal["LInfFMNAttack", "L2FMNAttack", "L1FMNAttack", "L0FMNAttack"]
    steps: Steps = 100
    max_stepsize: Positive = 1.0
    min_stepsize: Positive | None = None
    gamma: Share = 0.05


class NewtonFoolAttack(_Gradient, _Named):
    """NewtonFool (Jang et al., 2017)."""

    name: Literal["NewtonFoolAttack"]
    steps: Steps = 100
    stepsize: Positive = 0.01


class BrendelBethgeAttack(_Gradient, _Named):
    """Along the decision boundary by gradients (Brendel et al., 2019); needs the package numba."""

    name: Literal[
        "LinfinityBrendelBethgeAttack", "L2BrendelBethgeAttack", "L1BrendelBethgeAttack", "L0BrendelBethgeAttack"
    ]
    steps: Steps = 1000
    overshoot: Annotated[FiniteFloat, Field(ge=1)] = 1.1
    lr: Positive = 1e-3
    lr_decay: Share = 0.5
    lr_num_decay: Annotated[int, Field(ge=1, le=1000)] = 20
    momentum: Annotated[FiniteFloat, Field(ge=0, lt=1)] = 0.8
    binary_search_steps: Halvings = 10


class AutoGradientAttack(_Gradient, _Named):
    """APGD on the cross-entropy, or on the targeted DLR loss (Croce and Hein, 2020)."""

    within: ClassVar[bool] = True

    name: Literal["LinfAPGD", "L2APGD", "LinfAPGDT", "L2APGDT"]
    steps: Steps = 100
    restarts: Restarts = 1
    # Classes that the targeted attack aims at, the likeliest first; for the other attack there are none.
    targets: Annotated[int, Field(ge=1, le=1000)] | None = None

    @model_validator(mode="after")
    def _targets_if_targeted(self) -> Self:
        if self.targets is not None and not self.name.endswith("T"):
            raise ValueError(f"targets: expected none for {self.name}, which is not targeted; leave it out")
        return self


class BoundaryProjectionAttack(_Gradient, _Named):
    """FAB-T, the fast adaptive boundary attack, targeted (Croce and Hein, 2020)."""

    name: Literal["LinfFABT", "L2FABT"]
    steps: Steps = 100
    restarts: Restarts = 1
    targets: Annotated[int, Field(ge=1, le=1000)] = 9


class SquareAttack(_Named):
    """Square, a random search by scores (Andriushchenko et al., 2020)."""

    within: ClassVar[bool] = True

    name: Literal["LinfSquare", "L2Square"]
    access: Literal["score"] = "score"
    steps: Steps = 5000
    restarts: Restarts = 1
    p_init: Share = 0.8


class DisagreementAttack(_Choosing):
    """Search for images on which target and reference differ, within epsilon; by gradients where there are any."""

    within: ClassVar[bool] = True

    name: Literal["Disagreement"]
    norm: Literal["linf", "l2"] = "linf"
    access: Literal["white-box", "score"] = "white-box"
    gradients: Literal["auto", "checkpoint", "onnx", "all"] = "auto"
    steps: Steps = 100
    # What an image may have without gradients.
    queries: Draws = 1000


class DecisionAttack(_Named):
    """Boundary attack (Brendel et al., 2018): top-1 answers of the engine are all that it sees."""

    name: Literal["BoundaryAttack"]
    access: Literal["decision"] = "decision"
    steps: Steps = 1000
    # Foolbox's own values (0.01, 0.01, 10) adapt the step sizes after 300 steps, for the first time. On 50 digits, 300
    # steps from the same starts came to a median L2 distance of 5.3 with those, and of 3.4 with these, which adapt
    # after 30 steps at twice the queries a step; 2,000 steps with Foolbox's came to 3.2.
    spherical_step: Positive = 0.03
    source_step: Positive = 0.003
    source_step_convergance: Positive = 1e-7
    step_adaptation: Annotated[FiniteFloat, Field(gt=1)] = 1.5
    update_stats_every_k: Annotated[int, Field(ge=1, le=1000)] = 1


class HopSkipJumpAttack(_Choosing):
    """HopSkipJump (Chen et al., 2020): the direction of the boundary, estimated from top-1 answers."""

    name: Literal["HopSkipJumpAttack"]
    norm: Literal["linf", "l2"] = "l2"
    access: Literal["decision"] = "decision"
    steps: Steps = 64
    initial_gradient_eval_steps: Draws = 100
    max_gradient_eval_steps: Draws = 10_000
    gamma: Positive = 1.0


class SpatialAttack(_Named):
    """Rotations and translations (Engstrom et al., 2019): epsilon 1, the default, is every image within the limits."""

    name: Literal["SpatialAttack"]
    access: Literal["decision"] = "decision"
    epsilons: Annotated[tuple[Epsilon, ...], AfterValidator(unique)] = Field(default=("1",), min_length=1)
    max_translation: NotNegative = 3.0
    max_rotation: Annotated[FiniteFloat, Field(ge=0, le=180)] = 30.0
    num_translations: Annotated[int, Field(ge=1, le=100)] = 5
    num_rotations: Annotated[int, Field(ge=1, le=360)] = 5
    grid_search: bool = True
    random_steps: Draws = 100


class NoiseAttack(_Named):
    """Random noise, `repeats` draws an image: what no adversary is needed for."""

    within: ClassVar[bool] = True

    name: Literal[
        "LinfUniformNoise",
        "L2GaussianNoise",
        "LinfRepeatedAdditiveUniformNoiseAttack",
        "L2RepeatedAdditiveGaussianNoiseAttack",
        "L2RepeatedAdditiveUniformNoiseAttack",
        "L2ClippingAwareRepeatedAdditiveGaussianNoiseAttack",
        "L2ClippingAwareRepeatedAdditiveUniformNoiseAttack",
    ]
    access: Literal["decision"] = "decision"
    repeats: Draws = 100


class SingleNoiseAttack(_Named):
    """Random noise, one draw an image."""

    within: ClassVar[bool] = True

    name: Literal[
        "LinfAdditiveUniformNoiseAttack",
        "L2AdditiveGaussianNoiseAttack",
        "L2AdditiveUniformNoiseAttack",
        "L2ClippingAwareAdditiveGaussianNoiseAttack",
        "L2ClippingAwareAdditiveUniformNoiseAttack",
    ]
    access: Literal["decision"] = "decision"


class BlendedNoiseAttack(_Choosing):
    """Blending with uniform noise, ever more of it."""

    name: Literal["LinearSearchBlendedUniformNoiseAttack"]
    access: Literal["decision"] = "decision"
    directions: Draws = 1000
    steps: Steps = 1000


class SaltAndPepperAttack(_Named):
    """Salt and pepper noise, ever more of it."""

    name: Literal["SaltAndPepperNoiseAttack"]
    access: Literal["decision"] = "decision"
    steps: Steps = 1000
    across_channels: bool = True


class BlurAttack(_Choosing):
    """Gaussian blur, ever more of it; `max_sigma` in pixels, by default the image's longer side."""

    name: Literal["GaussianBlurAttack"]
    access: Literal["decision"] = "decision"
    steps: Steps = 1000
    max_sigma: Positive | None = None


class ContrastAttack(_Named):
    """Contrast reduced by a perturbation of the given size, towards grey of `target`."""

    within: ClassVar[bool] = True

    name: Literal["L2ContrastReductionAttack"]
    access: Literal["decision"] = "decision"
    target: Annotated[FiniteFloat, Field(ge=0, le=1)] = 0.5


class ContrastSearchAttack(_Choosing):
    """The smallest reduction of contrast, by halving."""

    name: Literal["BinarySearchContrastReductionAttack"]
    access: Literal["decision"] = "decision"
    binary_search_steps: Halvings = 15
    target: Annotated[FiniteFloat, Field(ge=0, le=1)] = 0.5


class ContrastLineAttack(_Choosing):
    """The smallest reduction of contrast, step by step."""

    name: Literal["LinearSearchContrastReductionAttack"]
    access: Literal["decision"] = "decision"
    steps: Steps = 1000
    target: Annotated[FiniteFloat, Field(ge=0, le=1)] = 0.5


class InversionAttack(_Choosing):
    """The negative of the image."""

    name: Literal["InversionAttack"]
    access: Literal["decision"] = "decision"


class SuiteAttack(_Choosing):
    """AutoAttack's standard suite (Croce and Hein, 2020): APGD-CE, APGD-T, FAB-T, Square; survivors only go on."""

    within: ClassVar[bool] = True

    name: Literal["AutoAttack"]
    suite: Literal["standard"] = "standard"
    norm: Literal["linf", "l2"] = "linf"
    access: Literal["white-box"] = "white-box"
    gradients: Literal["auto", "checkpoint", "onnx", "all"] = "auto"
    decisions: Literal["iterates", "results"] = "iterates"


# What is no parameter of the attack itself.
_COMMON = {*_Entry.model_fields, *_Gradient.model_fields, "norm", "suite"}

_Tables = (
    SingleStepAttack
    | GradientAttack
    | IterativeAttack
    | MomentumAttack
    | SparseDescentAttack
    | VirtualAttack
    | DeepFoolAttack
    | CarliniWagnerAttack
    | ElasticNetAttack
    | DecoupledAttack
    | MinimumNormAttack
    | NewtonFoolAttack
    | BrendelBethgeAttack
    | AutoGradientAttack
    | BoundaryProjectionAttack
    | SquareAttack
    | DisagreementAttack
    | DecisionAttack
    | HopSkipJumpAttack
    | SpatialAttack
    | NoiseAttack
    | SingleNoiseAttack
    | BlendedNoiseAttack
    | SaltAndPepperAttack
    | BlurAttack
    | ContrastAttack
    | ContrastSearchAttack
    | ContrastLineAttack
    | InversionAttack
    | SuiteAttack
)


def _named(table: Any) -> Any:
    """Return a suite's table under the name of its family."""
    if isinstance(table, dict) and "suite" in table and "name" not in table:
        return {"name": "AutoAttack", **table}
    return table


Attack = Annotated[_Tables, Field(discriminator="name"), BeforeValidator(_named)]


def check_size(attack: _Tables, *, image_shape: tuple[int, int, int]) -> None:
    """Check that an attack's epsilons are within the bounds of an image.

    Args:
        attack: an entry of the plan.
        image_shape: (channels, height, width).

    Raises:
        ValueError: there is an epsilon above the distance between black and white.
    """
    count = math.prod(image_shape)
    largest = {"linf": 1.0, "l2": math.sqrt(count), "l1": float(count), "l0": float(count)}[attack.norm]
    for epsilon in attack.epsilons:
        if epsilon_value(epsilon) > largest:
            raise ValueError(
                f"attacks.{attack.id}.epsilons: expected at most {largest:g} in {attack.norm}, the distance between "
                f"black and white of a {image_shape} image in [0, 1], got {epsilon!r}; give a smaller one"
            )


def _check_bounds(epsilons: tuple[str, ...], norm: Norm) -> None:
    for epsilon in epsilons:
        if norm == "linf" and epsilon_value(epsilon) > 1:
            raise ValueError(
                f"epsilons: expected at most 1 in linf, since images are in [0, 1], got {epsilon!r}; write 8 grey "
                "levels as '8/255'"
            )
