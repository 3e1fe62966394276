"""`tenet demo`: the whole flow on real images, in a few minutes, on any machine.

train --> export fp32, int8, plan --> serve --> classify --> audit both engines --> table, page
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from export import summary
from export.console import complain, console
from service.commands import audit as audits
from service.commands import train as trains

if TYPE_CHECKING:
    from collections.abc import Iterator

    from export.repository import Repository, Version
    from service.client import Client

# A small model is ready in a second or two; on a machine under load it takes longer.
_START_SECONDS = 60
_STOP_SECONDS = 20


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("demo", epilog="Example: tenet demo")(demo)


def demo(
    out: Annotated[
        Path | None, typer.Option(help="The folder to work in; it must not exist. Default: demo/DATE-TIME.")
    ] = None,
) -> None:
    """Train, export, serve and audit a classifier of handwritten digits; the last line is the report's path."""
    from export.repository import Repository

    began = time.perf_counter()
    folder = out or Path("demo") / datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    if folder.exists():
        raise FileExistsError(f"{folder}: exists already; choose another folder with --out")
    try:
        page = _flow(folder, Repository(folder / "models"))
    except KeyboardInterrupt:
        complain(f"what was made so far is in {folder}; remove it when you do not need it")
        raise
    console.print(f"total {time.perf_counter() - began:.0f} s; open the report in a browser:")
    typer.echo(page)


def _flow(folder: Path, repository: Repository) -> Path:
    """Run the whole flow and return the report's path."""
    _say(1, "train a small classifier with TENET on scikit-learn's digits")
    _train(folder / "runs" / "digits")
    _say(2, "export it, with proof of parity")
    _export(folder / "runs" / "digits", repository)
    with _service(folder) as address:
        from service.client import Client

        with Client(address) as client:
            _say(3, f"classify the test images by gRPC, served on {address}")
            for model in ("digits", "digits-int8"):
                console.print(f"{model}: {_classify(client, model)}")
            _say(4, "audit the deployed engines: attacks, corruptions, disagreement")
            return _audit(client, folder / "report.html")


def configs() -> Path:
    """Return the folder of the recipes and plans that ship with the product: in the wheel, or in a checkout."""
    packaged = Path(__file__).parents[1] / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "configs"


def _say(step: int, what: str) -> None:
    console.print(f"\n[bold]{step}. {what}[/bold]")


def _train(run: Path) -> None:
    from training import recipe

    console.print(str(trains.run(recipe.read(configs() / "digits.toml"), out=run)), soft_wrap=True)


def _export(run: Path, repository: Repository) -> None:
    from export import publish
    from export.variant import Variant, publish_variant

    fp32 = publish.publish_checkpoint(run, repository=repository, name="digits")
    _exported(fp32)
    _exported(publish_variant(fp32, repository=repository, name="digits-int8", variant=Variant("int8")))
    try:
        plan = Variant("fp32", "tensorrt_rtx")
        _exported(publish_variant(fp32, repository=repository, name="digits-rtx", variant=plan))
    except RuntimeError as error:
        console.print(f"no TensorRT plan: {error}", soft_wrap=True, markup=False)


def _exported(version: Version) -> None:
    console.print(summary.describe(version), soft_wrap=True, markup=False)


@contextmanager
def _service(folder: Path) -> Iterator[str]:
    """Run `tenet up` on a free port of this machine; yield its HOST:PORT."""
    options = ["--repository", str(folder / "models"), "--state", str(folder / "state"), "--port", "0"]
    log = folder / "service.log"
    with log.open("w") as output:
        command = [sys.executable, "-m", "service", "up", *options]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)  # noqa: S603 - our own command
    try:
        yield _address(process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text().splitlines():
            if line.startswith("serving "):
                return line.split(" on ", 1)[1].rsplit(": ", 1)[0]
        time.sleep(0.05)
    raise RuntimeError(f"the service did not start; its log, {log}, says why")


def _classify(client: Client, model: str) -> str:
    from service.audit import samples
    from training import datasets

    test = datasets.load("digits", split="test")
    began = time.perf_counter()
    logits = client.infer(samples.as_input(test.images), model=model)
    seconds = time.perf_counter() - began
    correct = int((logits.argmax(axis=1) == test.labels).sum())
    return f"{correct} of {len(test)} test images right ({correct / len(test):.2%}) in {seconds:.2f} s"


def _audit(client: Client, page: Path) -> Path:
    from service.audit import plan

    submitted = [
        client.submit_audit(plan.to_toml(plan.read(configs() / name))).id
        for name in ("audit-digits.toml", "audit-digits-int8.toml")
    ]
    audits.follow(client, submitted)
    reports = [audits.finished_report(client, audit_id) for audit_id in submitted]
    audits.show_reports(reports)
    audits.write_page(reports, page)
    return page
