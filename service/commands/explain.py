"""`tenet explain`: RUN, images -> where the classifier looks, as a picture and numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from export.console import console, print_table


def register(app: typer.Typer) -> None:
    """Add the verb."""
    example = "Example: tenet explain runs/plain --against runs/tenet --images photographs --out explained"
    app.command("explain", epilog=example)(explain)


def explain(
    run: Annotated[Path, typer.Argument(help="The RUN folder.")],
    images: Annotated[Path, typer.Option(help="A folder of images, or of one folder per class.")],
    out: Annotated[Path, typer.Option(help="The folder to write explain.png and explain.json into.")],
    *,
    against: Annotated[Path | None, typer.Option(help="Another RUN folder, of the same classes.")] = None,
    layer: Annotated[
        str | None,
        typer.Option(help="The layer to look at, as layer2, a recipe's TENET stage; by default the last with maps."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=1000, help="How many images, evenly spaced in the folder.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print the contents of explain.json.")] = False,
) -> None:
    """Show where a classifier looks, by Grad-CAM, beside another on the same images."""
    from training import explain as explaining

    runs = [run] if against is None else [run, against]
    record = explaining.compare(runs, images=images, out=out, layer=layer, count=count)
    if as_json:
        typer.echo(json.dumps(record))
        return
    print_table(["image", "true class", *_headings(record)], [_row(image) for image in record["images"]])
    for each in record["runs"]:
        error = "" if each["standard_error"] is None else f" ± {each['standard_error']:.1%}"
        text = f"{each['run']}: mean spread {each['mean_spread']:.1%}{error} (n = {each['n']}), layer {each['layer']}"
        console.print(text, soft_wrap=True, markup=False)
    console.print(str(out / explaining.PICTURE), soft_wrap=True, markup=False)


def _headings(record: dict[str, Any]) -> list[str]:
    return [heading for each in record["runs"] for heading in (each["run"], "spread")]


def _row(image: dict[str, Any]) -> list[str]:
    cells = [image["file"], image["true_class"] or ""]
    for prediction in image["predictions"]:
        cells += [f"{prediction['class']} ({prediction['probability']:.1%})", f"{prediction['spread']:.1%}"]
    return cells
