"""Where each attack of a plan gets its gradients, found before anything is spent.

plan --access, gradients, surrogate--> the target's own sources | a surrogate's --compared with who answers--> Sources
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from service.audit import samples
from service.audit.gradient import source
from service.audit.target.engine import EngineTarget

if TYPE_CHECKING:
    from export.engines.base import Images
    from export.repository import Repository, Version
    from service.audit.gradient.source import Source, Wanted
    from service.audit.plan import Attack, Plan
    from service.audit.samples import Samples
    from service.audit.target.base import Target

# Clean images on which a source is compared with the target: 0.99 of them is told from 0.95 nearly always.
_COMPARED = 200


class Gradients:
    """The sources of all attacks of a plan.

    Attributes:
        refused: why sources of the target's gradients that are wanted are not used.
        surrogates: other models' sources, by the names that the plan has for them.
        of_checks: what the sanity checks take gradients from; none where there are none.
        of_reference: the reference engine's, for attacks that look for disagreement; None without.

    Raises:
        FileNotFoundError, ValueError: an attack has no source that agrees with the target, or no surrogate.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        version: Version | None,
        repository: Repository | None,
        target: Target,
        samples: Samples,
        reference: Target | None = None,
        reference_version: Version | None = None,
    ) -> None:
        self._plan = plan
        self._repository = repository
        self._target = target
        self._images = torch.from_numpy(_compared(samples))
        self._origin = version if version is not None else _twin(plan, repository)
        self._own: dict[str, tuple[Source, ...]] = {}
        self.refused: tuple[str, ...] = ()
        self.surrogates: dict[str, Source] = {}
        for attack in plan.attacks:
            self._find(attack)
        self.of_checks = self._for_checks()
        self.of_reference = self._for_reference(reference, reference_version)

    def of(self, attack: Attack) -> tuple[Source, ...]:
        """Return the target's sources that an attack takes; none for one without gradients, or with a surrogate's."""
        return self._own[attack.gradients] if attack.access == "white-box" else ()

    def _find(self, attack: Attack) -> None:
        if attack.access == "white-box" and attack.gradients not in self._own:
            self._own[attack.gradients] = self._sources(attack.gradients, attack=attack.id)
        name = getattr(attack, "surrogate", None)
        if name is not None and name not in self.surrogates:
            self.surrogates[name] = self._of_surrogate(name, attack=attack.id)

    def _sources(self, wanted: Wanted, *, attack: str) -> tuple[Source, ...]:
        if self._origin is None:
            raise ValueError(
                f"attacks.{attack}: a white-box attack needs gradients, and {self._target.name} gives none; add "
                "target.twin, or take an attack by scores or decisions"
            )
        try:
            found = source.found(
                self._origin,
                repository=self._repository,
                wanted=wanted,
                target=self._target,
                images=self._images,
                mapping=self._plan.target.mapping if isinstance(self._origin, Path) else None,
            )
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"attacks.{attack}: {error}") from error
        self.refused += tuple(reason for reason in found.refused if reason not in self.refused)
        return found.sources

    def _of_surrogate(self, name: str, *, attack: str) -> Source:
        if self._repository is None:
            raise ValueError(f"attacks.{attack}: surrogate: expected a model repository with {name} in it, got none")
        version = self._repository.parse(name)
        with EngineTarget.opened(version) as engine:
            if engine.image_shape != self._target.image_shape:
                raise ValueError(
                    f"attacks.{attack}: surrogate: expected a model of images {self._target.image_shape}, got "
                    f"{version} of {engine.image_shape}; choose another"
                )
            (found,) = source.sources(
                version, repository=self._repository, wanted="auto", target=engine, images=self._images
            )
            return found

    def _for_reference(self, reference: Target | None, version: Version | None) -> Source | None:
        """Return the reference's own source, with which gradients say where the two engines differ; None without."""
        if reference is None or version is None or all(attack.name != "Disagreement" for attack in self._plan.attacks):
            return None
        try:
            (found,) = source.sources(
                version, repository=self._repository, wanted="auto", target=reference, images=self._images
            )
        except (FileNotFoundError, ValueError):
            return None
        return found

    def _for_checks(self) -> tuple[Source, ...]:
        """Return what the sanity checks take gradients from: of attacks that have them, or whatever there is."""
        if self._own:
            return max(self._own.values(), key=len)
        if self._origin is None:
            return ()
        try:
            return self._sources("auto", attack="checks")
        except ValueError:
            return ()


def _compared(chosen: Samples) -> Images:
    return samples.as_input(chosen.images[:_COMPARED])


def _twin(plan: Plan, repository: Repository | None) -> Version | Path | None:
    """Return whose gradients an endpoint's are taken for: a model of the repository, or an ONNX file."""
    name = plan.target.twin
    if name is None:
        return None
    if name.endswith(".onnx"):
        return Path(name)
    if repository is None:
        raise ValueError(f"target.twin: expected a model repository with {name} in it, got none; give one")
    return repository.parse(name)
