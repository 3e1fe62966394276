import foolbox
import pytest
import torch

from service.audit.attack.labels import labels_of, rivals


def test_labels_come_plain_or_as_a_criterion() -> None:
    labels = torch.tensor([3, 1])
    assert torch.equal(labels_of(labels), labels)
    assert torch.equal(labels_of(foolbox.Misclassification(labels)), labels)


def test_other_criteria_are_refused() -> None:
    with pytest.raises(ValueError, match="expected labels or Misclassification, got TargetedMisclassification"):
        labels_of(foolbox.TargetedMisclassification(torch.tensor([3])))


def test_rivals_are_the_wrong_classes_from_the_likeliest_down() -> None:
    logits = torch.tensor([[5.0, 2.0, 3.0, 1.0], [5.0, 2.0, 3.0, 1.0]])
    assert rivals(logits, torch.tensor([0, 2]), most=9).tolist() == [[2, 1, 3], [0, 1, 3]]
    assert rivals(logits, torch.tensor([0, 2]), most=1).tolist() == [[2], [0]]
