"""`tenet export`: RUN folder, or a model of the repository -> a new version in the repository."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands.console import console

if TYPE_CHECKING:
    from export.repository import Version


class Precision(StrEnum):
    """The precisions of an engine."""

    FP32 = "fp32"
    INT8 = "int8"


class Runtime(StrEnum):
    """What runs an engine."""

    ONNXRUNTIME = "onnxruntime"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt_rtx"


def register(app: typer.Typer) -> None:
    """Add the verb."""
    epilog = (
        "Examples: tenet export runs/digits --repository models --name digits  |  "
        "tenet export --from digits --repository models --name digits-int8 --precision int8"
    )
    app.command("export", epilog=epilog)(export)


def export(
    run: Annotated[Path | None, typer.Argument(help="A RUN folder of `tenet train`.")] = None,
    *,
    repository: Annotated[Path, typer.Option(help="The model repository; made if missing.")],
    name: Annotated[str, typer.Option(help="The model's name in the repository.")],
    source: Annotated[
        str | None, typer.Option("--from", help="Make a variant of NAME or NAME@VERSION of the repository.")
    ] = None,
    precision: Annotated[Precision, typer.Option(help="The engine's precision.")] = Precision.FP32,
    runtime: Annotated[Runtime, typer.Option(help="What will run the engine.")] = Runtime.ONNXRUNTIME,
    images: Annotated[Path | None, typer.Option(help="Folder of class folders for calibration and parity.")] = None,
    max_batch: Annotated[int | None, typer.Option(min=1, help="The largest batch it will take.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Export a checkpoint to ONNX, or a model to another precision or runtime, with proof of parity."""
    from export import publish
    from export.manifest import checked_name
    from export.repository import Repository

    checked_name(name)
    target = Repository(repository)
    if (run is None) == (source is None):
        raise ValueError("expected either a RUN folder or --from NAME, got both or neither; give one of them")
    if run is not None:
        if (precision, runtime) != (Precision.FP32, Runtime.ONNXRUNTIME):
            raise ValueError(
                f"a RUN folder becomes ONNX fp32 first: export it without --precision and --runtime, then make the "
                f"{precision} {runtime} variant with --from {name}"
            )
        batch = max_batch or publish.MAX_BATCH
        version = publish.publish_checkpoint(run, repository=target, name=name, images=images, max_batch=batch)
    else:
        assert source is not None
        version = publish.publish_variant(
            target.parse(source), repository=target, name=name, kind=precision.value, runtime=runtime.value,
            images=images, max_batch=max_batch,
        )  # fmt: skip
    if as_json:
        typer.echo(version.manifest.model_dump_json(indent=2))
    else:
        console.print(describe(version), soft_wrap=True)


def describe(version: Version) -> str:
    """Return one line on a published version and its proof."""
    manifest, proof = version.manifest, version.manifest.parity
    line = f"{version}: {manifest.precision} on {manifest.runtime}, parity with {proof.reference} {proof.status}"
    if proof.status == "not run":
        return f"{line} ({proof.explanation})"
    return (
        f"{line} on {proof.images}: top-1 agreement {proof.agreement:.2%}, "
        f"largest logit difference {proof.max_abs_difference:.2g}"
    )
