from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from export.intervals import wilson
from service.audit import gates
from service.audit.gates import Gate, Measured, Metric, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

ATTACKS = {("pgd", "8/255"), ("pgd", "2/255"), ("square", "8/255")}


def share(hits: int, n: int) -> Measured:
    return Measured(hits / n, *wilson(hits, n), n)


def by_image(values: np.ndarray) -> Measured:
    return Measured(float(values.mean()), *wilson(int(values.sum()), len(values)), len(values), values.astype(float))


def table(**numbers: Measured | None) -> Callable[[Metric], Measured | None]:
    return lambda metric: numbers[metric.name]


def between(low: float, high: float) -> Callable[[Metric], Measured]:
    return lambda _metric: Measured((low + high) / 2, low, high, 100)


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
        ('median_distance["pgd"] >= 3', (3.5, np.inf), "pass"),
        ("ece <= 0.05", (0.06, 0.1), "fail"),
        ("not accuracy >= 0.5", (0.6, 0.8), "fail"),
        ("not (accuracy >= 0.5)", (0.4, 0.6), "inconclusive"),
    ],
)
def test_a_comparison_is_decided_only_when_the_interval_is_on_one_side(
    text: str, interval: tuple[float, float], outcome: str
) -> None:
    assert gates.parse(text).judge(between(*interval), samples=100).outcome == outcome


# 900 of 1000 passes >= 0.5, 100 of 1000 fails, 500 of 1000 is open.
@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("{p} and {p}", "pass"),
        ("{p} and {o}", "inconclusive"),
        ("{f} and {o}", "fail"),
        ("{p} or {o}", "pass"),
        ("{f} or {o}", "inconclusive"),
        ("{f} or {f}", "fail"),
        ("{f} or {p} and {o}", "inconclusive"),
        ("({p} or {f}) and {o}", "inconclusive"),
        ("not ({f} and {o}) and {p}", "pass"),
        ("not {o} or {p}", "pass"),
    ],
)
def test_conditions_are_decided_as_soon_as_the_open_ones_make_no_difference(text: str, outcome: Outcome) -> None:
    measure = table(accuracy=share(900, 1000), worst_case=share(100, 1000), disagreement=share(500, 1000))
    written = text.format(p="accuracy >= 0.5", f="worst_case >= 0.5", o="disagreement >= 0.5")
    assert gates.parse(written).judge(measure, samples=1000).outcome == outcome


def test_every_metric_can_be_named() -> None:
    texts = [
        "accuracy",
        'class_accuracy["it\'s a cat"]',
        'robust_accuracy["pgd", "8/255"]',
        "worst_case",
        'worst_case["8/255"]',
        "mean_error",
        "disagreement",
        "corrupted_disagreement",
        "perturbed_disagreement",
        'perturbed_disagreement["pgd"]',
        "ece",
        'median_distance["pgd"]',
    ]
    for text in texts:
        (metric,) = gates.parse(f"{text} <= 0.5").metrics
        assert str(metric) == text


def test_a_drop_is_decided_by_the_interval_of_the_paired_difference() -> None:
    right = np.arange(1000) < 900
    robust = np.arange(1000) < 640
    gate = gates.parse('accuracy - robust_accuracy["pgd", "8/255"] <= 0.3')
    paired = gate.judge(table(accuracy=by_image(right), robust_accuracy=by_image(robust)), samples=1000)
    apart = gate.judge(table(accuracy=share(900, 1000), robust_accuracy=share(640, 1000)), samples=1000)
    assert (paired.outcome, apart.outcome) == ("pass", "pass")
    (compared,) = paired.comparisons
    (wider,) = apart.comparisons
    assert compared.measured is not None
    assert wider.measured is not None
    assert compared.measured.value == pytest.approx(0.26)
    assert compared.measured.high - compared.measured.low < wider.measured.high - wider.measured.low


def test_an_inconclusive_gate_says_how_many_samples_would_decide_it() -> None:
    judgement = gates.parse("accuracy >= 0.40").judge(table(accuracy=share(45, 100)), samples=100)
    assert judgement.outcome == "inconclusive"
    assert judgement.samples is not None
    more = round(judgement.samples / 20) * 20 + 20
    assert (
        gates.parse("accuracy >= 0.40").judge(table(accuracy=share(more * 45 // 100, more)), samples=more).outcome
        == "pass"
    )
    fewer = judgement.samples // 20 * 20 - 20
    left = gates.parse("accuracy >= 0.40").judge(table(accuracy=share(fewer * 45 // 100, fewer)), samples=fewer)
    assert left.outcome == "inconclusive"


def test_the_accuracy_of_a_class_is_decided_by_its_own_images() -> None:
    measure = table(class_accuracy=share(45, 100))
    judgement = gates.parse('class_accuracy["cat"] >= 0.4').judge(measure, samples=1000)
    (compared,) = judgement.comparisons
    assert compared.needed is not None
    # A tenth of the images are cats, so that ten times as many images are needed as cats.
    assert judgement.samples == 10 * compared.needed


@pytest.mark.parametrize(
    ("text", "by"),
    [
        ("accuracy >= 0.4 and disagreement <= 0.5", "slow"),
        ("accuracy >= 0.4 or disagreement <= 0.5", "quick"),
        ("accuracy < 0.4 and disagreement > 0.5", "quick"),
        ("not (accuracy >= 0.4 or disagreement <= 0.5)", "quick"),
        ("accuracy >= 0.4 and worst_case >= 0.5", None),
        ("accuracy >= 0.4 or worst_case > 0.5", "quick"),
    ],
)
def test_a_condition_needs_the_samples_of_the_comparisons_that_decide_it(text: str, by: str | None) -> None:
    numbers = {"accuracy": share(45, 100), "disagreement": share(48, 100), "worst_case": share(50, 100)}
    judgement = gates.parse(text).judge(table(**numbers), samples=100)
    assert judgement.outcome == "inconclusive"
    needs = {compared.comparison.first.name: compared.needed for compared in judgement.comparisons}
    quick, slow = needs["accuracy"], needs.get("disagreement")
    assert judgement.samples == {"quick": quick, "slow": slow, None: None}[by]


def test_a_number_at_its_limit_is_decided_by_no_number_of_samples() -> None:
    judgement = gates.parse("accuracy >= 0.5").judge(table(accuracy=share(50, 100)), samples=100)
    assert (judgement.outcome, judgement.samples) == ("inconclusive", None)


def test_what_was_not_measured_is_inconclusive() -> None:
    judgement = gates.parse("accuracy - disagreement >= 0.5").judge(
        table(accuracy=share(5, 10), disagreement=None), samples=10
    )
    assert (judgement.outcome, judgement.samples, judgement.comparisons[0].measured) == ("inconclusive", None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected METRIC OP NUMBER"),
        ("accuracy", "expected METRIC OP NUMBER"),
        (3, "expected METRIC OP NUMBER or .* got 3"),
        ("1 +", "expected METRIC OP NUMBER"),
        ("accuracy >= x", "expected a number on the right, got 'x'"),
        ("accuracy >= True", "expected a number on the right, got 'True'"),
        ("accuracy >= 1e999", "expected a number on the right"),
        ("accuracy == 1", "expected METRIC OP NUMBER .* got 'accuracy == 1'"),
        ("0.5 <= accuracy <= 1", "expected METRIC OP NUMBER"),
        ("__import__('os') >= 1", 'expected one of the metrics accuracy, .* got "__import__'),
        ("beauty >= 1", "expected one of the metrics accuracy, .* got 'beauty', in 'beauty >= 1'"),
        ("accuracy['x'] >= 1", r'expected accuracy, got accuracy\["x"\]'),
        ("robust_accuracy['pgd'] >= 0.1", r'expected robust_accuracy\["attack id", "epsilon"\], got'),
        ("robust_accuracy[pgd, '1'] >= 0.1", "expected a name in quotation marks in the brackets, got 'pgd'"),
        ("accuracy >= 40", "expected a limit from 0 to 1, got 40; 40 % is 0.4"),
        ("accuracy - disagreement >= -2", "expected a limit from -1 to 1, got -2"),
        ("accuracy - ece >= 0", "expected a difference of means over images, got accuracy - ece >= 0"),
        ("accuracy - worst_case - ece >= 0", "expected one of the metrics"),
        ("accuracy + worst_case >= 0", "expected one of the metrics"),
        ("accuracy >= 0.5 and 1", "expected METRIC OP NUMBER .* got '1'"),
        ("accuracy >= 0.5 and " * 60 + "accuracy >= 0.5", "expected METRIC OP NUMBER"),
        ("(" * 300, "expected METRIC OP NUMBER"),
        ("accuracy >= \0", "expected METRIC OP NUMBER"),
    ],
)
def test_anything_else_is_refused_and_says_why(text: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        gates.parse(text)
    assert "\n" not in str(caught.value)


@given(
    st.text(max_size=40)
    | st.text(alphabet="accuracy wost_dn(not)>=<0.5-[]'\"andor", max_size=40)
    | st.lists(st.sampled_from(["accuracy", ">=", "0.5", "and", "or", "not", "(", ")", "-", "ece"]), max_size=12).map(
        " ".join
    )
)
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_no_text_makes_the_parser_fail_otherwise(text: str) -> None:
    try:
        gates.parse(text)
    except ValueError:
        return


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('robust_accuracy["pgd", "4/255"] > 0', r'gates\.g: expected one of robust_accuracy\["pgd", "2/255"\], .*got'),
        ('worst_case["1"] > 0', r'gates\.g: expected one of worst_case\["2/255"\], worst_case\["8/255"\], got'),
        ('median_distance["x"] > 0', r'expected one of median_distance\["pgd"\], median_distance\["square"\], got'),
        ("accuracy > 0 and mean_error < 1", r"gates\.g: mean_error needs corruptions in the plan"),
        ("accuracy - disagreement < 1", r"gates\.g: disagreement needs a reference"),
        ('class_accuracy["dog"] > 0', "expected a class of the target .* one of cat, bird"),
    ],
)
def test_a_plan_must_measure_what_its_gates_compare(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gates.parse(text).check_subject("g", ATTACKS, corruptions=False, reference=False, class_names=("cat", "bird"))


def test_a_gate_that_the_plan_measures_is_accepted() -> None:
    gate = gates.parse(
        'robust_accuracy["pgd", "8/255"] > 0 and worst_case["2/255"] > 0 and mean_error < 1 and ece < 0.1 and '
        'perturbed_disagreement["square"] < 1 and corrupted_disagreement < 1 and class_accuracy["cat"] > 0'
    )
    gate.check_subject("g", ATTACKS, corruptions=True, reference=True)
    with pytest.raises(ValueError, match="robust_accuracy needs an attack in the plan"):
        gate.check_subject("g", set(), corruptions=True, reference=True)


def test_a_gate_in_a_plan_is_written_as_it_was_read() -> None:
    adapter = TypeAdapter(Gate)
    text = "accuracy - worst_case  <=  0.3 or not ece > 0.1"
    assert adapter.dump_python(adapter.validate_python(text), mode="json") == text


def test_a_gate_outcome_turns_round_with_not() -> None:
    @settings(deadline=None)
    @given(st.integers(1, 500), st.floats(0, 1), st.sampled_from([">=", ">", "<=", "<"]), st.data())
    def turned(n: int, limit: float, operator: str, data: st.DataObject) -> None:
        measure = table(accuracy=share(data.draw(st.integers(0, n)), n))
        plain = gates.parse(f"accuracy {operator} {limit!r}").judge(measure, samples=n)
        opposite = {">=": "<", ">": "<=", "<=": ">", "<": ">="}[operator]
        negated = gates.parse(f"not accuracy {opposite} {limit!r}").judge(measure, samples=n)
        assert (plain.outcome, plain.samples) == (negated.outcome, negated.samples)

    turned()


def test_gates_need_no_torch() -> None:
    code = "import sys, service.audit.gates, service.audit.sequential; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
