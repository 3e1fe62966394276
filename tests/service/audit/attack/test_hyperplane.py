from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor

from service.audit.attack.hyperplane import to_hyperplane_l2, to_hyperplane_linf

Projection = Callable[[Tensor, Tensor, Tensor], Tensor]

_D = 12


def _problems(n: int, *, gap: float) -> tuple[Tensor, Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(0)
    points, normals = torch.rand(n, _D, generator=numbers), torch.randn(n, _D, generator=numbers)
    normals[:, 0] = 0.0  # a pixel that does not matter
    return points, normals, gap * torch.randn(n, generator=numbers)


def _linear_programme(point: Tensor, normal: Tensor, gap: Tensor) -> float:
    """Return the least maximum norm of a change to the plane: minimise t with |change| <= t."""
    identity, ones = np.eye(_D), np.ones((_D, 1))
    solved = optimize.linprog(
        np.append(np.zeros(_D), 1.0),
        A_ub=np.block([[identity, -ones], [-identity, -ones]]),
        b_ub=np.zeros(2 * _D),
        A_eq=np.append(normal.double().numpy(), 0.0)[None],
        b_eq=[-gap.item()],
        bounds=[*zip((-point).tolist(), (1 - point).tolist(), strict=True), (0, None)],
    )
    assert solved.status == 0
    return float(solved.fun)


def _quadratic_programme(point: Tensor, normal: Tensor, gap: Tensor) -> float:
    """Return the least Euclidean norm of a change to the plane."""
    across, distance = normal.double().numpy(), gap.item()
    solved = optimize.minimize(
        lambda change: float(change @ change),
        np.zeros(_D),
        jac=lambda change: 2 * change,
        bounds=list(zip((-point).tolist(), (1 - point).tolist(), strict=True)),
        constraints={"type": "eq", "fun": lambda change: across @ change + distance},
        method="SLSQP",
        options={"ftol": 1e-12},
    )
    assert solved.success
    return float(np.linalg.norm(solved.x))


def test_maximum_norm_agrees_with_a_linear_programme() -> None:
    points, normals, gaps = _problems(30, gap=0.5)
    changes = to_hyperplane_linf(points, normals, gaps)
    least = [_linear_programme(*problem) for problem in zip(points, normals, gaps, strict=True)]
    assert changes.abs().amax(1).tolist() == pytest.approx(least, abs=1e-6)


def test_euclidean_norm_agrees_with_a_quadratic_programme() -> None:
    points, normals, gaps = _problems(10, gap=1.0)
    changes = to_hyperplane_l2(points, normals, gaps)
    for point, normal, gap, change in zip(points, normals, gaps, changes, strict=True):
        assert change.norm().item() == pytest.approx(_quadratic_programme(point, normal, gap), abs=1e-4)


@pytest.mark.parametrize("project", [to_hyperplane_linf, to_hyperplane_l2])
class TestBoth:
    def test_the_result_lies_on_the_plane_and_in_the_box(self, project: Projection) -> None:
        points, normals, gaps = _problems(50, gap=0.5)
        moved = points + project(points, normals, gaps)
        left = gaps + ((moved - points) * normals).sum(1)
        assert left.abs().max() < 1e-5
        assert moved.min() >= -1e-6
        assert moved.max() <= 1 + 1e-6

    def test_a_plane_beyond_the_box_is_approached_as_far_as_the_box_goes(self, project: Projection) -> None:
        points, normals, _ = _problems(20, gap=1.0)
        moved = points + project(points, normals, torch.full((20,), 1e3))
        corner = torch.where(normals > 0, 0.0, 1.0)
        matters = normals != 0
        assert torch.allclose(moved[matters], corner[matters], atol=1e-6)

    def test_no_gradient_means_no_change(self, project: Projection) -> None:
        points, normals, gaps = _problems(5, gap=1.0)
        changes = project(points, torch.zeros_like(normals), gaps)
        assert torch.equal(changes, torch.zeros_like(points))

    def test_gradients_as_small_as_a_saturated_network_gives_do_as_well(self, project: Projection) -> None:
        points, normals, gaps = _problems(20, gap=0.3)
        expected = project(points, normals, gaps)
        changes = project(points, normals * 1e-25, gaps * 1e-25)
        assert torch.allclose(changes, expected, atol=1e-5)
