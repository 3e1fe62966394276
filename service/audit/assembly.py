"""What became of every image -> report: sections, reasons for doubt, gates and the verdict.

[ShardResult] --outcomes.gather--> Outcomes --sections--> AttackReport, CorruptionsReport ... --check--> [Doubt]
                                       '--Measures, gates--> [GateReport] --> verdict --> Report
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from service.audit import calibration, checks, comparison, examples, outcomes, robustness, statistics
from service.audit.measures import Measures, adversarial
from service.audit.report import (
    Bin,
    CalibrationReport,
    Cell,
    CleanReport,
    CorruptionsReport,
    ExampleReport,
    GateReport,
    Report,
    SequentialReport,
    Shift,
    TermReport,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxtyping import Float64, Int64

    from service.audit.examples import Example
    from service.audit.gates import Compared, Gate, Judgement
    from service.audit.outcomes import Answers, Outcomes
    from service.audit.plan import Plan
    from service.audit.report import (
        AttackReport,
        DifferentialReport,
        Doubt,
        OpenInterval,
        TargetReport,
        Verdict,
    )
    from service.audit.samples import Samples
    from service.audit.sequential import Sequential
    from service.audit.shard import ShardResult

    Check = Callable[[Plan, Sequence[ShardResult], Sequence[AttackReport]], Sequence[Doubt]]

# An interval over images needs two of them.
_FEWEST = 2

# Places of this machine are nothing that a report's reader needs; an audit of the same files elsewhere is the same.
_PLACES = {"target": {"repository"}, "data": {"folder", "root"}}


def assemble(
    plan: Plan,
    *,
    samples: Samples,
    class_names: Sequence[str],
    target: TargetReport,
    reference: TargetReport | None,
    results: Sequence[ShardResult],
    check: Check,
    provenance: dict[str, object],
    stopping: Sequential | None = None,
    kept: Sequence[Example] = (),
    error: str = "",
    refused: Sequence[str] = (),
) -> Report:
    """Put the results of an audit's shards together.

    Args:
        plan: of the audit.
        samples: its images, labels and their places in the data.
        class_names: of the target, in the order of its logits.
        target: who was asked.
        reference: with whom it was compared.
        results: of all shards that were run.
        check: the reliability checks (service.audit.checks.check).
        provenance: what differs from run to run.
        stopping: what looked at the gates after every slice, of a plan that may stop early.
        kept: adversarial images of the shards.
        error: what ended the audit before its end; the report is then partial.
        refused: why sources of gradients were not used.

    Raises:
        ValueError: there is no answer to any clean image.
    """
    found = outcomes.gather(outcomes.in_plan_order(plan, results), labels=samples.labels)
    reports = {
        attack.id: robustness.attack(attack, found, class_names=class_names)
        for attack in plan.attacks
        if attack.id in found.attacked
    }
    searching = [attack.id for attack in adversarial(plan)]
    attacks = tuple(own for name, own in reports.items() if name in searching)
    warnings = tuple(check(plan, results, attacks))
    measures = Measures(plan, found, class_names=class_names)
    gates = _gates(plan, measures, stopping, samples=len(found.clean.rows))
    return Report(
        audit={"plan": plan.model_dump(mode="json", exclude=_PLACES)},
        complete=not error,
        error=error,
        target=target,
        data=_data(plan, n=len(samples)),
        clean=_clean(found, class_names=class_names),
        attacks=attacks,
        worst_case=robustness.worst_case(adversarial(plan), found),
        corruptions=_corruptions(found, seed=plan.data.seed),
        differential=_differential(
            found,
            reference,
            attacks=searching,
            searches=[own for name, own in reports.items() if name not in searching],
            seed=plan.data.seed,
        ),
        calibration=_calibration(found, attacks=searching, seed=plan.data.seed),
        sequential=_sequential(plan, stopping, gates),
        examples=_examples(plan, found, kept, samples=samples, class_names=class_names),
        gates=gates,
        warnings=warnings,
        not_checked=checks.not_checked(results),
        refused_sources=tuple(refused),
        verdict=_verdict(gates, warnings, complete=not error),
        provenance=provenance,
    )


def _data(plan: Plan, *, n: int) -> dict[str, object]:
    source = plan.data
    name = f"{source.dataset} {source.split}" if source.dataset else source.folder.name if source.folder else ""
    return {"source": name, "n": n, "seed": source.seed}


def _clean(found: Outcomes, *, class_names: Sequence[str]) -> CleanReport:
    correct, labels = found.correct(found.clean), found.labels[found.clean.rows]
    return CleanReport(
        **robustness.proportion(correct).model_dump(),
        classes=robustness.by_class(correct, labels, class_names=class_names),
    )


def _corruptions(found: Outcomes, *, seed: int) -> CorruptionsReport | None:
    if not found.corrupted:
        return None
    rows = robustness.shared_rows([answers.rows for answers in found.corrupted.values()])
    errors = np.stack([~found.correct(a)[np.searchsorted(a.rows, rows)] for a in found.corrupted.values()], axis=1)
    if len(errors) < _FEWEST:
        return None
    return CorruptionsReport(
        cells=tuple(_cell(name, severity, found, answers) for (name, severity), answers in found.corrupted.items()),
        mean_error=float(errors.mean()),
        interval=statistics.bootstrap_mean(errors, seed=seed),
        n=len(errors),
    )


def _cell(name: str, severity: int, found: Outcomes, answers: Answers) -> Cell:
    share = robustness.proportion(~found.correct(answers))
    differ = comparison.differences([answers])
    return Cell(
        corruption=name,
        severity=severity,
        error=share.accuracy,
        interval=share.interval,
        n=share.n,
        disagreement=None if differ is None else float(differ.mean()),
    )


def _differential(
    found: Outcomes,
    reference: TargetReport | None,
    *,
    attacks: Sequence[str],
    searches: Sequence[AttackReport],
    seed: int,
) -> DifferentialReport | None:
    if reference is None or found.clean.reference is None:
        return None
    return comparison.report(found, reference=reference, attacks=attacks, searches=searches, seed=seed)


def _calibration(found: Outcomes, *, attacks: Sequence[str], seed: int) -> CalibrationReport | None:
    confidences = found.clean.confidences
    if confidences is None:
        return None
    correct = found.correct(found.clean)
    error = calibration.expected_calibration_error(confidences, correct, seed=seed)
    changed = {"corruptions": list(found.corrupted.values())}
    changed |= {name: [found.attacked[name].nearest] for name in attacks if name in found.attacked}
    shifts = (_shift(on, several, found.clean, seed=seed) for on, several in changed.items())
    return CalibrationReport(
        ece=error.value,
        interval=(error.low, error.high),
        n=error.n,
        bins=tuple(Bin(**each._asdict()) for each in calibration.reliability(confidences, correct)),
        shifts=tuple(shift for shift in shifts if shift is not None),
    )


def _shift(on: str, several: Sequence[Answers], clean: Answers, *, seed: int) -> Shift | None:
    """Return the shift of each image's mean confidence over several changes of it."""
    known = [answers for answers in several if answers.confidences is not None]
    if not known:
        return None
    rows = robustness.shared_rows([answers.rows for answers in (clean, *known)])
    if len(rows) < _FEWEST:
        return None
    after = np.mean([_confidences(answers, rows) for answers in known], axis=0)
    shift = calibration.confidence_shift(_confidences(clean, rows), after, seed=seed)
    return Shift(on=on, shift=shift.value, interval=(shift.low, shift.high), n=shift.n)


def _confidences(answers: Answers, rows: Int64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    assert answers.confidences is not None
    return answers.confidences[np.searchsorted(answers.rows, rows)]


def _examples(
    plan: Plan, found: Outcomes, kept: Sequence[Example], *, samples: Samples, class_names: Sequence[str]
) -> tuple[ExampleReport, ...]:
    attacks = {attack.id: attack for attack in adversarial(plan)}
    chosen = examples.worst([each for each in kept if each.attack in attacks])
    return tuple(
        examples.describe(each, found, attack=attacks[each.attack], indices=samples.indices, class_names=class_names)
        for each in chosen
    )


def _sequential(plan: Plan, stopping: Sequential | None, gates: Sequence[GateReport]) -> SequentialReport | None:
    if stopping is None or plan.sequential is None:
        return None
    return SequentialReport(
        error_rate=plan.sequential.error_rate,
        decided=all(gate.outcome != "inconclusive" for gate in gates),
        planned=stopping.savings.planned,
        used=stopping.savings.used,
        saved=stopping.savings.share,
    )


def _gates(plan: Plan, measures: Measures, stopping: Sequential | None, *, samples: int) -> tuple[GateReport, ...]:
    """Report the gates; intervals that were looked at again and again are those of the sequential mode."""
    looked = stopping.judgements() if stopping is not None else {}
    return tuple(
        _gate(name, gate, looked[name] if stopping is not None else gate.judge(measures, samples=samples))
        for name, gate in plan.gates.items()
    )


def _gate(name: str, gate: Gate, judgement: Judgement) -> GateReport:
    terms = tuple(map(_term, judgement.comparisons))
    only: dict[str, Any] = {}
    if len(terms) == 1:
        only = {"value": terms[0].value, "interval": terms[0].interval, "n": terms[0].n}
    return GateReport(
        name=name, gate=gate.text, outcome=judgement.outcome, samples=judgement.samples, terms=terms, **only
    )


def _term(compared: Compared) -> TermReport:
    number = compared.measured
    interval: OpenInterval | None = None if number is None else (_finite(number.low), _finite(number.high))
    return TermReport(
        text=str(compared.comparison),
        value=None if number is None else _finite(number.value),
        interval=interval,
        n=0 if number is None else number.n,
        outcome=compared.outcome,
        needed=compared.needed,
    )


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _verdict(gates: Sequence[GateReport], warnings: Sequence[Doubt], *, complete: bool) -> Verdict:
    outcomes = {gate.outcome for gate in gates}
    if "fail" in outcomes:
        return "fail"
    if "inconclusive" in outcomes or not complete:
        return "inconclusive"
    return "untrusted" if warnings else "pass"
