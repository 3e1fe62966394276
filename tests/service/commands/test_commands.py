"""The verbs that end by themselves: their output, their exit codes, their errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from service import __main__ as command_line
from tests.processes import tenet

if TYPE_CHECKING:
    from export.repository import Repository

ROOT = Path(__file__).parents[3]


def _verbs() -> list[list[str]]:
    groups = command_line.app.registered_groups
    verbs = [[str(command.name)] for command in command_line.app.registered_commands]
    for group in groups:
        assert group.typer_instance is not None
        verbs += [[str(group.name), str(command.name)] for command in group.typer_instance.registered_commands]
    return verbs


@pytest.mark.parametrize("verb", _verbs(), ids=" ".join)
def test_every_verb_has_help_with_an_example_and_stands_in_the_readme(verb: list[str]) -> None:
    result = CliRunner().invoke(command_line.app, [*verb, "--help"])
    assert result.exit_code == 0
    assert "Example" in result.output
    assert f"tenet {' '.join(verb)}" in (ROOT / "README.md").read_text()


def test_models_are_listed_and_shown(digits_models: Repository) -> None:
    listed = tenet("models", "list", "--repository", str(digits_models.folder), "--json")
    assert [manifest["model"] for manifest in json.loads(listed.stdout)] == ["digits", "digits-int8"]
    shown = tenet("models", "show", "digits@1", "--repository", str(digits_models.folder))
    assert json.loads(shown.stdout)["parity"]["status"] == "passed"


def _plan(tmp_path: Path, repository: Repository, gate: str) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(
        f'[target]\nrepository = "{repository.folder}"\nmodel = "digits"\n[data]\ndataset = "digits"\nsamples = 40\n'
        f"[gates]\nclean = '{gate}'\n"
    )
    return path


def test_an_audit_run_here_writes_its_reports_and_passes(digits_models: Repository, tmp_path: Path) -> None:
    plan = _plan(tmp_path, digits_models, "accuracy >= 0.5")
    json_file, html_file = tmp_path / "out.json", tmp_path / "out.html"
    result = tenet("audit", "run", str(plan), "--json", str(json_file), "--html", str(html_file))
    assert result.returncode == 0, result.stderr
    assert json.loads(json_file.read_text())["verdict"] == "pass"
    assert html_file.read_text().startswith("<!doctype html>")
    assert "digits@1 (fp32)" in result.stdout


def test_a_failed_gate_is_exit_code_1(digits_models: Repository, tmp_path: Path) -> None:
    result = tenet("audit", "run", str(_plan(tmp_path, digits_models, "accuracy <= 0.5")))
    assert result.returncode == 1
    assert "gate clean: fail" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["train", "nowhere.toml", "--out", "x"], "nowhere.toml"),
        (["export", "nowhere", "--repository", "m", "--name", "x"], "nowhere"),
        (["export", "--repository", "m", "--name", "x"], "expected one of a RUN folder, --from NAME, --factory"),
        (["export", "--from", "a", "--repository", "m", "--name", "x"], "m: expected a model repository here"),
        (["export", "nowhere", "--repository", "m", "--name", "../x"], "model name '../x': expected letters"),
        (["models", "list", "--repository", "nowhere"], "nowhere: expected a model repository here"),
        (["serve", "--repository", "nowhere", "--port", "0"], "nowhere: expected a model repository here"),
        (["audit", "run", "nowhere.toml"], "nowhere.toml: expected an audit plan here"),
        (["audit", "list", "--server", "127.0.0.1:1"], "cannot reach 127.0.0.1:1"),
        (["predict", "x.png", "--server", "127.0.0.1:1", "--model", "m"], "cannot reach 127.0.0.1:1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], complaint: str, tmp_path: Path) -> None:
    result = tenet(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert complaint in line
    assert list(tmp_path.rglob("*.onnx")) == []


def test_an_unknown_recipe_key_is_named(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text((ROOT / "configs" / "digits.toml").read_text().replace("depth = 8", "depht = 8"))
    result = tenet("train", str(recipe), "--out", str(tmp_path / "run"))
    assert result.returncode == 2
    assert "model.depht" in result.stderr
    assert not (tmp_path / "run").exists()
