"""What an audit leaves behind: a folder of files, the same from every run but for the report's provenance.

Report --> report.json, report.html (with the pictures)
results --> outcomes.csv: one line an image
kept --> examples.npz: the nearest adversarial images, exactly; examples/ATTACK-ROW.png: for the eye
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.audit import examples, outcomes, page
from service.audit.report import FILE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.audit.examples import Example
    from service.audit.plan import Plan
    from service.audit.report import Report
    from service.audit.samples import Samples
    from service.audit.shard import ShardResult


def files(
    report: Report,
    *,
    plan: Plan,
    samples: Samples,
    class_names: Sequence[str],
    results: Sequence[ShardResult],
    kept: Sequence[Example] = (),
) -> dict[str, bytes]:
    """Return all files of an audit by their names, relative to its folder.

    Args:
        report: of the audit.
        plan: of the audit.
        samples: as `assembly.assemble` has them.
        class_names: of the target.
        results: of all shards that were run.
        kept: adversarial images of the shards, of which those that the report names become files.
    """
    named = {example.picture for example in report.examples}
    shown = [example for example in examples.worst(kept) if example.picture in named]
    pictures = {example.picture: examples.to_png(example) for example in shown}
    found = outcomes.gather(outcomes.in_plan_order(plan, results), labels=samples.labels)
    table = outcomes.to_csv(found, indices=samples.indices, class_names=class_names)
    text = report.to_json()
    return {
        "report.html": page.render([text], pictures=[pictures]).encode(),
        "outcomes.csv": table.encode(),
        "examples.npz": examples.to_npz(shown),
        **{f"examples/{name}": content for name, content in pictures.items()},
        # Written last: where it is, all is there.
        FILE: text.encode(),
    }
