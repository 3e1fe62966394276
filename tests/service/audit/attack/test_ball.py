import pytest
import torch

from service.audit.attack.ball import L2, LINF, Ball


@pytest.mark.parametrize("ball", [LINF, L2])
class TestBoth:
    def test_random_places_lie_on_the_surface_and_follow_the_generator(self, ball: Ball) -> None:
        like = torch.zeros(16, 3, 4, 4)
        changes = ball.surface(like, generator=torch.Generator().manual_seed(1))
        assert ball.size(changes).tolist() == pytest.approx([1.0] * 16)
        assert torch.equal(changes, ball.surface(like, generator=torch.Generator().manual_seed(1)))
        assert not torch.equal(changes, ball.surface(like, generator=torch.Generator().manual_seed(2)))

    def test_what_is_inside_stays_and_what_is_outside_comes_to_the_surface(self, ball: Ball) -> None:
        clean = torch.full((2, 1, 4, 4), 0.5)
        changes = ball.surface(clean, generator=torch.Generator().manual_seed(0))
        near, far = (ball.inside(clean + size * changes, clean=clean, epsilon=0.1) for size in (0.05, 0.4))
        assert torch.allclose(near, clean + 0.05 * changes)
        assert ball.size(far - clean).tolist() == pytest.approx([0.1] * 2)

    def test_images_stay_between_black_and_white(self, ball: Ball) -> None:
        clean = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 4, 4)
        moved = ball.inside(clean + torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1), clean=clean, epsilon=0.5)
        assert torch.equal(moved, clean)


def test_steepest_steps_are_signs_or_unit_vectors() -> None:
    gradients = torch.tensor([3.0, 0.0, 0.0, -4.0]).view(1, 1, 2, 2)
    assert LINF.steepest(gradients).flatten().tolist() == [1, 0, 0, -1]
    assert L2.steepest(gradients).flatten().tolist() == pytest.approx([0.6, 0, 0, -0.8])
    assert L2.steepest(torch.zeros(1, 1, 2, 2)).flatten().tolist() == [0, 0, 0, 0]
