"""Reliability checks: when an audit's own numbers should not be believed, and why.

[ShardResult] (probes, distances by image) --Evidence--> check.answers, check.searches --> [Doubt]
                                               '-------> check.contests --Holm-----------> [Doubt]
Each check is a function named for its code, whose docstring says when it is raised and what that means.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.audit.check import answers, contests, searches
from service.audit.check.evidence import Evidence
from service.audit.report import Doubt
from service.audit.statistics import holm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from service.audit.check.contests import Contest
    from service.audit.plan import Plan
    from service.audit.report import AttackReport
    from service.audit.shard import ShardResult

# Of all contests of an audit together: how rarely one that is no more than chance may be called a win.
SIGNIFICANCE = 0.01

CHECKS: tuple[Callable[[Evidence], list[Doubt]], ...] = (
    answers.constant_outputs,
    answers.randomised_outputs,
    answers.batch_dependent_outputs,
    answers.softmax_outputs,
    answers.saturated_outputs,
    searches.zero_gradients,
    searches.source_disagrees,
    searches.large_epsilon,
    searches.parts_differ,
    searches.budget_spent,
)
CONTESTS: tuple[Callable[[Evidence], list[Contest]], ...] = (
    contests.single_step_wins,
    contests.gradient_free_wins,
    contests.noise_wins,
    contests.transfer_wins,
    contests.not_monotone,
    contests.steps_change,
    contests.restarts_change,
)

# What is not measured on a target without a source of gradients.
_OF_GRADIENTS = (
    searches.zero_gradients,
    searches.source_disagrees,
    contests.single_step_wins,
    contests.gradient_free_wins,
    contests.transfer_wins,
    contests.not_monotone,
    contests.restarts_change,
)
# What needs the plan's attacks alone, and no probe.
_OF_THE_PLAN = (searches.parts_differ, searches.budget_spent)


def not_checked(results: Sequence[ShardResult]) -> tuple[str, ...]:
    """Return the codes of the checks that were not made: without gradients some, of an audit that ended early all."""
    probes = {probe.code for result in results for probe in result.probes}
    if not probes:
        return tuple(each.__name__ for each in (*CHECKS, *CONTESTS) if each not in _OF_THE_PLAN)
    return tuple(each.__name__ for each in _OF_GRADIENTS) if "no_gradients" in probes else ()


def check(plan: Plan, results: Sequence[ShardResult], attacks: Sequence[AttackReport]) -> list[Doubt]:
    """Run all checks.

    Args:
        plan: of the audit.
        results: of its shards, in any order.
        attacks: the reports of its attacks that search for a wrong class.

    Returns:
        What was raised; of contests, for each attack only where it lost most clearly.
    """
    evidence = Evidence(plan, results, attacks)
    doubts = [doubt for each in CHECKS for doubt in each(evidence)]
    return doubts + _won([contest for each in CONTESTS for contest in each(evidence)])


def _won(found: Sequence[Contest]) -> list[Doubt]:
    """Return the contests that were won, corrected for their number; for each code and attack the clearest one."""
    clearest: dict[tuple[str, str], tuple[float, Contest]] = {}
    for contest, p_value in zip(found, holm([each.p_value for each in found]), strict=True):
        key = (contest.code, contest.subject)
        if p_value <= SIGNIFICANCE and (key not in clearest or p_value < clearest[key][0]):
            clearest[key] = (p_value, contest)
    return [
        Doubt(code=contest.code, explanation=f"{contest.explanation} (McNemar, Holm: p = {p_value:.2g})")
        for p_value, contest in clearest.values()
    ]
