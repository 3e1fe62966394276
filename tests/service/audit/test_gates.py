from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.audit import gates
from service.audit.gates import Measured


@pytest.mark.parametrize(
    ("text", "interval", "outcome"),
    [
        ("accuracy >= 0.5", (0.6, 0.8), "pass"),
        ("accuracy >= 0.5", (0.2, 0.4), "fail"),
        ("accuracy >= 0.5", (0.4, 0.6), "inconclusive"),
        ("mean_error <= 0.5", (0.2, 0.4), "pass"),
        ("mean_error < 0.5", (0.6, 0.8), "fail"),
        ("disagreement < 0.01", (0.0, 0.04), "inconclusive"),
        ("worst_case > 0", (0.1, 0.2), "pass"),
        ("worst_case > 0", (0.0, 0.2), "inconclusive"),
        ("worst_case >= 0", (0.0, 0.2), "pass"),
        ("accuracy > 0.5", (0.3, 0.5), "fail"),
        ("accuracy >= 0.5", (0.3, 0.5), "inconclusive"),
        ("disagreement < 1", (0.9, 1.0), "inconclusive"),
        ("disagreement < 0.1", (0.1, 0.2), "fail"),
    ],
)
def test_a_gate_decides_only_when_the_interval_is_on_one_side(
    text: str, interval: tuple[float, float], outcome: str
) -> None:
    assert gates.parse(text).judge(Measured(sum(interval) / 2, *interval)) == outcome


def test_robust_accuracy_names_attack_and_epsilon() -> None:
    gate = gates.parse('robust_accuracy["pgd", "8/255"] >= 0.40')
    assert (gate.subject, gate.key, gate.operator, gate.limit) == ("robust_accuracy", ("pgd", "8/255"), ">=", 0.4)


@pytest.mark.parametrize(
    "text",
    ["", "accuracy", "accuracy >= x", "accuracy == 1", "0.5 <= accuracy <= 1", "__import__('os') >= 1", 3, "1 +"],
)
def test_anything_else_is_refused_with_the_form(text: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        gates.parse(text)


@given(st.text(max_size=40))
def test_no_text_makes_the_parser_fail_otherwise(text: str) -> None:
    try:
        gates.parse(text)
    except ValueError:
        return
