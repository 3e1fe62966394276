"""`tenet models status` as a person meets it: which models answer, which do not and why, and what they have done."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from protos.inference import open_inference_pb2 as pb
from protos.inference.open_inference_pb2_grpc import GRPCInferenceServiceServicer
from service import __main__ as command_line
from service.client import Client, Duration, IndexEntry, ModelStatistics
from service.commands import model_status
from service.settings import Settings
from tests.service.certificates import Authority
from tests.service.client.answering import serving as serving_of

if TYPE_CHECKING:
    from pathlib import Path

    from typer.testing import Result

    from export.engines.base import Images
    from service.server import Serving
    from tests.service.conftest import Start


def status(address: str, *arguments: str, environment: dict[str, str] | None = None) -> Result:
    given = ["models", "status", "--server", address, "--over", "0", *arguments]
    return CliRunner().invoke(command_line.app, given, env=environment)


def records(address: str, *arguments: str) -> dict[str, Any]:
    result = status(address, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return {f"{each['model']}@{each['version']}": each for each in json.loads(result.stdout)}


def test_every_version_is_listed_with_its_state(serving: Serving) -> None:
    found = records(serving.address)
    assert found["linear@1"]["state"] == found["linear@2"]["state"] == "READY"
    assert found["unproven@1"]["state"] == "UNAVAILABLE"
    assert "parity" in found["unproven@1"]["reason"]


def test_the_table_says_why_a_version_does_not_answer(serving: Serving) -> None:
    result = status(serving.address)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert any("linear@2" in line and "READY" in line for line in lines)
    assert any(line.startswith("unproven@1: ") and "parity" in line for line in lines)


def test_what_was_done_is_counted(start: Start, repository: Path, images: Images) -> None:
    address = start(repository).address
    with Client(address) as client:
        client.infer(images, model="linear", version=2)
    done = records(address)["linear@2"]["statistics"]
    # 25 images of which a request has 8.
    assert (done["requests"], done["failed"], done["images"], done["executions"]) == (4, 0, 25, 4)
    assert done["mean_batch"] == 25 / 4
    assert done["mean_compute_ms"] > 0
    assert done["mean_queue_ms"] >= 0
    assert done["images_per_second"] is None
    idle = records(address)["linear@1"]["statistics"]
    assert (idle["requests"], idle["mean_batch"], idle["mean_compute_ms"]) == (0, None, None)


def test_images_a_second_are_those_of_now(serving: Serving) -> None:
    found = records(serving.address, "--over", "0.05")
    assert found["linear@1"]["statistics"]["images_per_second"] == 0


def test_each_number_stands_under_its_heading() -> None:
    counted = ModelStatistics(
        "digits",
        "2",
        images=90,
        executions=20,
        succeeded=Duration(40, 9_000_000),
        failed=Duration(3, 1),
        queue=Duration(40, 50_000_000),
        compute=Duration(40, 280_000_000),
        cache_hit=Duration(0, 0),
        cache_miss=Duration(0, 0),
    )
    entry = IndexEntry("digits", "2", "READY", "")
    found = model_status.Status(entry, ("stable", "canary"), counted, images_per_second=61.25)
    assert dict(zip(model_status.HEADINGS, model_status.row(found), strict=True)) == {
        "model": "digits@2",
        "aliases": "stable, canary",
        "state": "READY",
        "requests": "43",
        "failed": "3",
        "images/s": "61.2",
        "queue ms": "1.25",
        "compute ms": "7.00",
        "mean batch": "4.5",
    }


class Index(GRPCInferenceServiceServicer):
    """Of a server that tells nothing else, as a port for operators may."""

    def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Any) -> pb.RepositoryIndexResponse:
        del request, context
        response = pb.RepositoryIndexResponse()
        response.models.add(name="digits", version="2", state="READY")
        return response


def test_a_server_that_neither_counts_nor_describes_shows_its_index() -> None:
    with serving_of(Index()) as address:  # type: ignore[abstract]  # nobody asks for the rest
        assert records(address) == {
            "digits@2": {
                "model": "digits",
                "version": "2",
                "state": "READY",
                "reason": "",
                "aliases": [],
                "statistics": None,
            }
        }


def test_a_server_that_is_not_there_is_one_line() -> None:
    result = status("127.0.0.1:1")
    assert result.exit_code == 1
    assert "cannot reach 127.0.0.1:1" in str(result.exception)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def test_certificates_and_token_come_from_the_environment(
    start: Start, repository: Path, tmp_path: Path, authority: Authority
) -> None:
    from hashlib import sha256

    tls = authority.server().write(tmp_path, client_ca=authority.certificate)
    token = {"name": "us", "sha256": sha256(b"secret").hexdigest(), "roles": ["predict"]}
    settings = Settings.model_validate({"auth": {"tokens": [token]}}).model_copy(update={"tls": tls})
    address = start(repository, settings).address
    pair = authority.client("us")
    files = {"ca": authority.certificate, "cert": pair.certificate, "key": pair.key, "token_file": b"secret\n"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    environment = {f"TENET_{name.upper()}": str(tmp_path / name) for name in files}
    found = status(address, "--json", environment=environment)
    assert found.exit_code == 0, found.exception
    assert "linear" in {each["model"] for each in json.loads(found.stdout)}
    without = status(address, environment={**environment, "TENET_TOKEN_FILE": ""})
    assert "who has not said who it is" in str(without.exception)


def test_a_token_file_that_is_empty_is_named(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(" \n")
    result = status("127.0.0.1:1", "--token-file", str(tmp_path / "token"))
    assert str(result.exception).startswith(f"--token-file: {tmp_path / 'token'}: expected a token, the file is empty")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--token-file", "nowhere"], "--token-file: nowhere: expected a file with a token here, found none"),
        (["--ca", "nowhere"], "ca: nowhere: expected a PEM file here, found none"),
        (["--cert", "x", "--key", "y"], "expected --ca with them"),
        (["--ca", "public", "--cert", "x"], "key: expected a file, as there is a cert"),
    ],
)
def test_options_that_do_not_fit_are_named(arguments: list[str], complaint: str) -> None:
    result = status("127.0.0.1:1", *arguments)
    assert complaint in str(result.exception)
