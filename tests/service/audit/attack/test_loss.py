import pytest
import torch

from service.audit.attack.loss import cross_entropy, dlr, targeted_dlr

_LOGITS = torch.tensor([[3.0, 1.0, 0.5, -1.0], [0.0, 2.0, 4.0, 1.0]])
_LABELS = torch.tensor([0, 1])
_RIVALS = torch.tensor([1, 3])


def test_cross_entropy_is_in_nats() -> None:
    assert cross_entropy(torch.zeros(1, 4), torch.tensor([2]), torch.tensor([0])).item() == pytest.approx(1.386294)


def test_difference_of_logits_ratio_as_equation_6_has_it() -> None:
    # -(3 - 1) / (3 - 0.5) for a right answer; -(2 - 4) / (4 - 1) for a wrong one.
    assert dlr(_LOGITS, _LABELS, _RIVALS).tolist() == pytest.approx([-2 / 2.5, 2 / 3])


def test_targeted_ratio_as_equation_7_has_it() -> None:
    # Rival less label, over the highest less the mean of third and fourth: 3 - (0.5 - 1) / 2 and 4 - (1 + 0) / 2.
    assert targeted_dlr(_LOGITS, _LABELS, _RIVALS).tolist() == pytest.approx([-2 / 3.25, -1 / 3.5])


def test_ratios_do_not_see_the_scale_of_logits() -> None:
    for ratio in (dlr, targeted_dlr):
        assert ratio(_LOGITS * 1000, _LABELS, _RIVALS).tolist() == pytest.approx(
            ratio(_LOGITS, _LABELS, _RIVALS).tolist()
        )


def test_ratios_stay_finite_where_all_logits_agree() -> None:
    for ratio in (dlr, targeted_dlr):
        assert ratio(torch.ones(2, 4), _LABELS, _RIVALS).tolist() == [0, 0]


@pytest.mark.parametrize(("ratio", "least"), [(dlr, 3), (targeted_dlr, 4)])
def test_too_few_classes_are_named(ratio: object, least: int) -> None:
    with pytest.raises(ValueError, match=f"expected at least {least} classes, got {least - 1}; use cross-entropy"):
        ratio(_LOGITS[:, : least - 1], _LABELS, _LABELS)  # type: ignore[operator]
