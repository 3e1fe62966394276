"""Rotations and translations, until the model errs: Foolbox's attack, for the images that are not fooled yet.

images --rotated and shifted: a grid, or at random--> model --fooled? the image leaves--> next
Source: Engstrom, Tran, Tsipras, Schmidt, Madry, "Exploring the landscape of spatial robustness", ICML 2019.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import eagerpy as ep
import foolbox
import torch
from foolbox.attacks.base import raise_if_kwargs, verify_input_bounds
from foolbox.attacks.spatial_attack_transformations import rotate_and_shift

from service.audit.attack.labels import labels_of
from service.audit.attack.model import select

if TYPE_CHECKING:
    from collections.abc import Iterable


class SpatialAttack(foolbox.attacks.SpatialAttack):
    """Foolbox's, whose random choices come from a generator."""

    def __init__(
        self,
        *,
        generator: torch.Generator,
        max_translation: float = 3,
        max_rotation: float = 30,
        num_translations: int = 5,
        num_rotations: int = 5,
        grid_search: bool = True,
        random_steps: int = 100,
    ) -> None:
        """Prepare the attack.

        Args:
            generator: of random transformations.
            max_translation: in pixels, either way and in both directions.
            max_rotation: in degrees, either way.
            num_translations: of the grid, in each direction.
            num_rotations: of the grid.
            grid_search: whether to go through the grid, or through random transformations.
            random_steps: how many of these.
        """
        super().__init__(
            max_translation=max_translation,
            max_rotation=max_rotation,
            num_translations=num_translations,
            num_rotations=num_rotations,
            grid_search=grid_search,
            random_steps=random_steps,
        )
        self.generator = generator

    def run(self, model: foolbox.Model, inputs: Any, criterion: Any, **kwargs: Any) -> Any:
        """Return for each image its first transformation that fools the model; itself where none does.

        Args:
            model: decides.
            inputs: (n, C, H, W) images within the model's bounds.
            criterion: the labels, or Foolbox's `Misclassification` of them.
            kwargs: none.
        """
        raise_if_kwargs(kwargs)
        wrapped, restore = ep.astensor_(inputs)
        verify_input_bounds(wrapped, model)
        images, labels = wrapped.raw, labels_of(criterion)
        found, left = images.clone(), torch.arange(len(images), device=images.device)
        for rotation, right, down in self._transformations():
            moved = rotate_and_shift(ep.astensor(images[left]), translation=(right, down), rotation=rotation).raw
            hit = torch.ne(select(model, left)(moved.clamp(*model.bounds)).argmax(dim=1), labels[left])
            found[left[hit]] = moved[hit]
            left = left[~hit]
            if len(left) == 0:
                break
        return restore(ep.astensor(found))

    def _transformations(self) -> Iterable[list[float]]:
        """Return (degrees, pixels, pixels) of each."""
        if not self.grid_search:
            limits = torch.tensor([self.max_rot, self.max_trans, self.max_trans], dtype=torch.float64)
            shares = torch.rand(self.random_steps, 3, generator=self.generator, dtype=torch.float64) * 2 - 1
            drawn: list[list[float]] = (shares * limits).tolist()
            return drawn
        shifts = torch.linspace(-self.max_trans, self.max_trans, self.num_trans).tolist()
        rotations = torch.linspace(-self.max_rot, self.max_rot, self.num_rots).tolist()
        return [list(point) for point in product(rotations, shifts, shifts)]
