"""Shard results -> report: proportions, intervals, sanity checks, gates and the verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from export.intervals import wilson
from service.audit import checks, statistics
from service.audit.gates import Measured
from service.audit.plan import epsilon_value
from service.audit.report import (
    AttackReport,
    Cell,
    CorruptionsReport,
    DifferentialReport,
    EngineReport,
    EpsilonReport,
    GateReport,
    Proportion,
    Report,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from export.repository import Version
    from service.audit.auditor import Auditor, ShardResult
    from service.audit.gates import Gate
    from service.audit.plan import Attack, Plan
    from service.audit.report import Doubt, Verdict


def assemble(auditor: Auditor, results: Sequence[ShardResult], *, provenance: dict[str, object]) -> Report:
    """Put the results of all shards of an audit together."""
    plan = auditor.plan
    by_kind = {kind: [r for r in results if r.shard.kind == kind] for kind in ("clean", "attack", "corruption")}
    (clean,) = by_kind["clean"]
    attacks = tuple(_attack(attack, _joined(attack, by_kind["attack"])) for attack in plan.attacks)
    warnings = tuple(checks.check(results, attacks))
    corrupted = _corruptions(by_kind["corruption"], seed=plan.data.seed) if by_kind["corruption"] else None
    differential = None
    if auditor.reference_version is not None:
        differential = _differential(auditor.reference_version, clean, by_kind["corruption"], seed=plan.data.seed)
    draft = Report(
        audit={"plan": plan.model_dump(mode="json", exclude={"target": {"repository"}, "data": {"folder", "root"}})},
        target=_engine(auditor.version),
        data=_data(plan, n=len(auditor.samples)),
        clean=_proportion(_bits(clean.correct)),
        attacks=attacks,
        worst_case=_worst_case(plan, by_kind["attack"]),
        corruptions=corrupted,
        differential=differential,
        warnings=warnings,
        verdict="pass",
        provenance=provenance,
    )
    gates = tuple(_gate(name, gate, draft) for name, gate in plan.gates.items())
    return draft.model_copy(update={"gates": gates, "verdict": _verdict(gates, warnings)})


def _engine(version: Version) -> EngineReport:
    manifest = version.manifest
    return EngineReport(
        model=manifest.model,
        version=manifest.version,
        sha256=manifest.sha256,
        runtime=manifest.runtime,
        precision=manifest.precision,
    )


def _data(plan: Plan, *, n: int) -> dict[str, object]:
    source = plan.data
    name = f"{source.dataset} {source.split}" if source.dataset else source.folder.name if source.folder else ""
    return {"source": name, "n": n, "seed": source.seed}


def _bits(flags: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.asarray(np.frombuffer(flags.encode(), dtype=np.uint8) == ord("1"))


def _proportion(flags: np.ndarray[Any, np.dtype[np.bool_]]) -> Proportion:
    hits, n = int(flags.sum()), len(flags)
    return Proportion(accuracy=hits / n, interval=wilson(hits, n), n=n)


def _joined(attack: Attack, results: Sequence[ShardResult]) -> list[ShardResult]:
    own = (result for result in results if result.shard.subject == attack.id)
    return sorted(own, key=lambda result: result.shard.start)


def _robust(results: Sequence[ShardResult], epsilon: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.concatenate([_bits(result.robust[epsilon]) for result in results])


def _attack(attack: Attack, results: Sequence[ShardResult]) -> AttackReport:
    queries = sum(result.queries for result in results)
    reports = []
    for epsilon in attack.epsilons:
        share = _proportion(_robust(results, epsilon))
        reports.append(
            EpsilonReport(
                epsilon=epsilon,
                size=epsilon_value(epsilon),
                robust_accuracy=share.accuracy,
                interval=share.interval,
                n=share.n,
                queries=queries / share.n,
            )
        )
    return AttackReport(id=attack.id, name=attack.name, access=attack.access, norm=attack.norm, results=tuple(reports))


def _worst_case(plan: Plan, results: Sequence[ShardResult]) -> Proportion | None:
    """Return the share of images that survive every attack of the plan at every epsilon."""
    survivors = [_robust(_joined(attack, results), epsilon) for attack in plan.attacks for epsilon in attack.epsilons]
    return _proportion(np.logical_and.reduce(survivors)) if survivors else None


def _corruptions(results: Sequence[ShardResult], *, seed: int) -> CorruptionsReport:
    errors = np.stack([~_bits(result.correct) for result in results], axis=1)
    return CorruptionsReport(
        cells=tuple(map(_cell, results)),
        mean_error=float(errors.mean()),
        interval=statistics.bootstrap_mean(errors, seed=seed),
        n=len(errors),
    )


def _cell(result: ShardResult) -> Cell:
    wrong = ~_bits(result.correct)
    share = _proportion(wrong)
    return Cell(
        corruption=result.shard.subject,
        severity=result.shard.severity,
        error=share.accuracy,
        interval=share.interval,
        n=share.n,
        disagreement=float((~_bits(result.agree)).mean()) if result.agree else None,
    )


def _differential(
    reference: Version, clean: ShardResult, corrupted: Sequence[ShardResult], *, seed: int
) -> DifferentialReport:
    share = _proportion(~_bits(clean.agree))
    ours, theirs = _bits(clean.correct), _bits(clean.reference_correct)
    extra: dict[str, Any] = {}
    if corrupted:
        differences = np.stack([~_bits(result.agree) for result in corrupted], axis=1)
        extra["corrupted_disagreement"] = float(differences.mean())
        extra["corrupted_interval"] = statistics.bootstrap_mean(differences, seed=seed)
    return DifferentialReport(
        reference=_engine(reference),
        reference_accuracy=float(theirs.mean()),
        p_value=statistics.mcnemar(int((ours & ~theirs).sum()), int((theirs & ~ours).sum())),
        disagreement=share.accuracy,
        interval=share.interval,
        n=share.n,
        **extra,
    )


def _gate(name: str, gate: Gate, report: Report) -> GateReport:
    measured = _measured(gate, report)
    return GateReport(
        name=name,
        gate=gate.text,
        value=measured.value,
        interval=(measured.low, measured.high),
        outcome=gate.judge(measured),
    )


def _measured(gate: Gate, report: Report) -> Measured:
    """Return the number that a gate compares; that the plan measures it was checked when it was read."""
    match gate.subject:
        case "accuracy":
            return Measured(report.clean.accuracy, *report.clean.interval)
        case "worst_case":
            assert report.worst_case is not None
            return Measured(report.worst_case.accuracy, *report.worst_case.interval)
        case "mean_error":
            assert report.corruptions is not None
            return Measured(report.corruptions.mean_error, *report.corruptions.interval)
        case "disagreement":
            assert report.differential is not None
            return Measured(report.differential.disagreement, *report.differential.interval)
    results = {(attack.id, result.epsilon): result for attack in report.attacks for result in attack.results}
    result = results[gate.key]  # type: ignore[index]
    return Measured(result.robust_accuracy, *result.interval)


def _verdict(gates: Sequence[GateReport], warnings: Sequence[Doubt]) -> Verdict:
    outcomes = {gate.outcome for gate in gates}
    if "fail" in outcomes:
        return "fail"
    if "inconclusive" in outcomes:
        return "inconclusive"
    return "untrusted" if warnings else "pass"
