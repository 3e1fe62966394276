"""A whole audit in this process: what `tenet audit run` does, and what a Python program calls.

    report = run(plan, repository=Repository(Path("models"))).report

plan --Auditor--> shard after shard --all done | gates decided | target failed--> assembled: report, files
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from export.store import atomic
from service.audit import artifacts, assembly, checks, examples, outcomes, provenance
from service.audit.auditor import Auditor, pin_threads
from service.audit.measures import Measures
from service.audit.sequential import Sequential
from service.audit.target.base import TargetFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from export.repository import Repository
    from service.audit.plan import Plan
    from service.audit.report import Report
    from service.audit.shard import ShardResult
    from service.client import Tls
    from service.client.connection import Token


@dataclass(frozen=True)
class Finished:
    """What an audit leaves.

    Attributes:
        report: all numbers and the verdict.
        files: name -> content: report, page, what became of every image, and the worst adversarial examples.
    """

    report: Report
    files: dict[str, bytes]

    def write(self, folder: Path) -> None:
        """Write the files into a folder, which is made if it is missing."""
        atomic.write_all(folder, self.files)


class Progressing:
    """Whether an audit goes on: asks for every shard in turn until all gates are decided.

    Results in the same order decide the same, so that a resumed audit hands in all of them again.
    """

    def __init__(self, auditor: Auditor) -> None:
        self._auditor = auditor
        plan = auditor.plan
        # None for a plan that does not stop early.
        self.stopping = (
            None
            if plan.sequential is None
            else Sequential(plan.gates, error_rate=plan.sequential.error_rate, planned=len(auditor.samples))
        )

    def decided(self, results: Sequence[ShardResult]) -> bool:
        """Return whether all gates are decided by these results; looked at when a slice is complete.

        Args:
            results: of all shards so far, in their order.
        """
        last = results[-1].shard
        if self.stopping is None or last.kind != "attack" or last.subject != self._auditor.plan.attacks[-1].id:
            return False
        found = outcomes.gather(results, labels=self._auditor.samples.labels)
        measures = Measures(self._auditor.plan, found, class_names=self._auditor.target.class_names)
        return self.stopping.look(measures, samples=last.stop)

    def replay(self, results: Sequence[ShardResult]) -> bool:
        """Look again at all results of an audit that another process began; return whether its gates are decided."""
        looks = [self.decided(results[:done]) for done in range(1, len(results) + 1)]
        return any(looks)


def run(
    plan: Plan,
    *,
    repository: Repository | None,
    device: str | None = None,
    tls: Tls | None = None,
    token: Token | None = None,
    progress: Callable[[int, int, str], None] = lambda _done, _total, _name: None,
) -> Finished:
    """Run an audit in this process.

    Args:
        plan: of the audit.
        repository: where its models are; None for an endpoint without a twin in one.
        device: of engines: "cpu", "cuda" or "cuda:N"; by default where they belong.
        tls: certificates for an endpoint.
        token: for an endpoint.
        progress: called after each shard with the shards done, those of the plan, and the shard's name.

    Returns:
        The report; a partial one, which says why, if the target failed on the way.

    Raises:
        ConnectionError, FileNotFoundError, ValueError: as `Auditor`; nothing has been measured then.
        TargetFailed: the target did not even answer the clean images.
    """
    pin_threads()
    with Auditor(plan, repository=repository, device=device, tls=tls, token=token) as auditor:
        results, error, progressing = [], "", Progressing(auditor)
        shards = auditor.shards
        for done, shard in enumerate(shards, start=1):
            try:
                results.append(auditor.run(shard))
            except TargetFailed as failure:
                if not results:
                    raise
                error = f"{shard.name}: {failure}"
                break
            progress(done, len(shards), shard.name)
            if progressing.decided(results):
                break
        workers = [provenance.worker()] * len(results)
        return finish(auditor, results, workers=workers, stopping=progressing.stopping, error=error)


def finish(
    auditor: Auditor,
    results: Sequence[ShardResult],
    *,
    workers: Sequence[str],
    stopping: Sequential | None = None,
    error: str = "",
    audit: str | None = None,
) -> Finished:
    """Put an audit's results together.

    Args:
        auditor: of the audit, open.
        results: of the shards that were run, in their order.
        workers: for each shard the process that ran it.
        stopping: what looked at the gates, of a plan that may stop early.
        error: what ended the audit before its end.
        audit: its id, if it was a submitted one.
    """
    worst = examples.worst([example for result in results for example in result.examples])
    class_names = auditor.target.class_names
    report = assembly.assemble(
        auditor.plan,
        samples=auditor.samples,
        class_names=class_names,
        target=auditor.described,
        reference=auditor.reference_described,
        results=results,
        check=checks.check,
        provenance=provenance.record(results, workers=workers, audit=audit),
        stopping=stopping,
        kept=worst,
        error=error,
        refused=auditor.refused,
    )
    files = artifacts.files(
        report, plan=auditor.plan, samples=auditor.samples, class_names=class_names, results=results, kept=worst
    )
    return Finished(report, files)
