"""What people read of a published version: one line on it and its proof, and tables of what differs most."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from export.console import console, print_table

if TYPE_CHECKING:
    from export.manifest import Parity
    from export.repository import Version
    from export.sensitivity import Report

# Layers of a bisection that are printed: the costly ones are few.
_LAYERS = 20


def report(version: Version, *, as_json: bool) -> None:
    """Print a published version: its manifest as JSON, or a line, with what was changed in it."""
    if as_json:
        typer.echo(version.manifest.model_dump_json(indent=2))
        return
    console.print(describe(version), soft_wrap=True, markup=False)
    for note in version.manifest.build.notes:
        console.print(f"  {note}", soft_wrap=True, markup=False)


def describe(version: Version) -> str:
    """Return one line on a published version and its proof."""
    manifest, proof = version.manifest, version.manifest.parity
    status = "failed, so it is blocked," if proof.status == "failed" else proof.status
    line = f"{version}: {manifest.precision} on {manifest.runtime}, parity with {proof.reference} {status}"
    if proof.images is None:
        return f"{line} ({proof.explanation})"
    said = f"; {proof.explanation}" if proof.explanation else ""
    return f"{line} on {proof.images.n} {proof.images.description}: {numbers(proof, manifest.output)}{said}"


def numbers(proof: Parity, output: str) -> str:
    """Return the numbers of a proof that was run."""
    assert proof.agreement is not None
    assert proof.agreement_interval is not None
    lower, upper = proof.agreement_interval
    parts = [f"top-1 agreement {proof.agreement:.2%} [{100 * lower:.1f}, {100 * upper:.1f}]"]
    if proof.accuracy is not None and proof.reference_accuracy is not None:
        parts.append(f"accuracy {proof.accuracy:.2%} and {proof.reference_accuracy:.2%}")
    kind = "probability" if output == "probabilities" else "logit"
    parts.append(f"largest {kind} difference {proof.max_abs_difference:.2g}")
    return ", ".join(parts)


def print_proof(proof: Parity, *, as_json: bool) -> None:
    """Print the images that an engine and its source differ on most, or all of a proof as JSON."""
    if as_json:
        typer.echo(proof.model_dump_json(indent=2))
        return
    rows = [
        [item.image, item.answer, item.expected, item.label or "", f"{item.logit_difference:.3g}"]
        for item in proof.worst
    ]
    print_table(["image", "engine", "source", "label", "difference"], rows)


def print_layers(found: Report, *, as_json: bool) -> None:
    """Print what each layer costs alone, and the list to keep in fp32 that is proposed."""
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    rows = [
        [layer.node, layer.operator, f"{layer.disagreement:.2%}", f"{layer.mean_abs_difference:.3g}"]
        for layer in found.layers[:_LAYERS]
    ]
    print_table(["layer, alone in the low precision", "operator", "disagreement", "mean difference"], rows)
    if found.proposal is None:
        console.print("no list of layers kept in fp32 brings it within the limit")
        return
    if not found.proposal:
        console.print("it is within the limit as it is")
        return
    flags = " ".join(f"--keep-fp32 {shlex.quote(node)}" for node in found.proposal)
    line = (
        f"disagreement {found.disagreement_before:.2%}, and {found.disagreement_after:.2%} with these "
        f"{len(found.proposal)} kept in fp32: {flags}"
    )
    console.print(line, soft_wrap=True, markup=False)
