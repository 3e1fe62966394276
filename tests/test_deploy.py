"""The files in deploy/: they are what Triton, Compose and KServe take, as far as that can be told without them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

DEPLOY = Path(__file__).parents[1] / "deploy"
FOLDERS = [folder for folder in sorted(DEPLOY.iterdir()) if folder.is_dir()]
SERVICES = sorted((DEPLOY / "kserve").glob("inference-service-*.yaml"))

# tritonserver's options that are used here, and their values, from its command_line_parser.cc.
_OPTIONS = {
    "--model-repository": r"/.+",
    "--disable-auto-complete-config": None,
    "--exit-on-error": "true|false",
    "--strict-readiness": "true|false",
    "--model-control-mode": "none|poll|explicit",
    "--repository-poll-secs": "[0-9]+",
}


def _assert_triton_takes(arguments: list[str]) -> None:
    for argument in arguments:
        name, given, value = argument.partition("=")
        pattern = _OPTIONS[name]
        assert bool(given) is (pattern is not None)
        assert pattern is None or re.fullmatch(pattern, value)
    # A model that Triton refuses must not stop the others, nor be made up.
    assert {"--exit-on-error=false", "--strict-readiness=false", "--disable-auto-complete-config"} <= set(arguments)
    assert ("--model-control-mode=poll" in arguments) is any("poll-secs" in argument for argument in arguments)


def _documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def test_compose_runs_triton_on_the_repository_as_it_is() -> None:
    (compose,) = _documents(DEPLOY / "triton" / "compose.yaml")
    triton = compose["services"]["triton"]
    program, *arguments = triton["command"]
    assert program == "tritonserver"
    _assert_triton_takes(arguments)
    (volume,) = triton["volumes"]
    assert volume.endswith(":/models:ro")
    assert "--model-repository=/models" in arguments
    assert [port.rpartition(":")[2] for port in triton["ports"]] == ["8000", "8001", "8002"]
    assert all(port.startswith("127.0.0.1:") for port in triton["ports"])


def test_the_gpu_s_file_adds_to_the_same_service() -> None:
    (compose,) = _documents(DEPLOY / "triton" / "compose.gpu.yaml")
    (device,) = compose["services"]["triton"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.stem)
def test_kserve_runs_its_triton_on_the_repository(path: Path) -> None:
    *others, service = _documents(path)
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    predictor = service["spec"]["predictor"]
    model = predictor["model"]
    assert (model["modelFormat"]["name"], model["runtime"]) == ("triton", "kserve-tritonserver")
    assert re.fullmatch(r"(s3|pvc)://[a-z-]+/models", model["storageUri"])
    _assert_triton_takes(model["args"])
    # As KServe has it for gRPC, on the port that its Triton runtime listens to.
    assert model["protocolVersion"] == "grpc-v2"
    assert model["ports"] == [{"name": "h2c", "containerPort": 9000, "protocol": "TCP"}]
    accounts = {other["metadata"]["name"] for other in others if other["kind"] == "ServiceAccount"}
    assert predictor.get("serviceAccountName") in {*accounts, None}
    if others:
        secrets = {other["metadata"]["name"] for other in others if other["kind"] == "Secret"}
        assert {s["name"] for other in others for s in other.get("secrets", ())} == secrets


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_each_folder_s_readme_names_its_files(folder: Path) -> None:
    readme = (folder / "README.md").read_text()
    for path in folder.glob("*.yaml"):
        assert path.name in readme


def test_nobody_is_promised_aliases_of_triton() -> None:
    """`tenet serve` takes an alias for a version; Triton takes numbers alone."""
    table = [line for line in (DEPLOY / "triton" / "README.md").read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    header, told = rows[0], [row for row in rows if any("alias" in cell for cell in row)]
    assert told
    ours, triton = (next(index for index, cell in enumerate(header) if name in cell) for name in ("tenet", "Triton"))
    assert all("alias" in row[ours] and "alias" not in row[triton] for row in told)
