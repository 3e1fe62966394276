"""`tenet models` as a person meets it: what it prints, its exit codes, its one-line errors."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING, Literal

import pytest
from typer.testing import CliRunner

from export.manifest import Parity, sha256_of
from export.repository import Repository, Version
from service import __main__ as command_line
from tests.export.disks import read_only
from tests.processes import tenet

if TYPE_CHECKING:
    from typer.testing import Result


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(command_line.app, ["models", *arguments])


def _publish(
    repository: Repository,
    like: Version,
    name: str,
    *,
    status: Literal["passed", "failed", "not run"] = "passed",
    variant: bool = False,
) -> Version:
    """Publish a version that says of itself what a test wants, with another version's engine."""
    with repository.draft(name) as draft:
        engine = draft.folder / like.manifest.file
        engine.write_bytes((like.folder / like.manifest.file).read_bytes())
        parity = Parity(status=status, reference="digits@1", explanation="a test wanted it so")
        manifest = like.manifest.model_copy(
            update={
                "model": name,
                "version": draft.version,
                "parity": parity,
                "twin": None,
                "sha256": sha256_of(engine),
            }
        )
        if not variant:
            manifest = manifest.model_copy(update={"source": None})
        draft.describe(manifest)
    return repository.find(name, draft.version)


@pytest.fixture
def repository(own_models: Repository) -> Repository:
    """`digits` 1 and 2, blocked 3 and unproven 4, and `digits-int8` made from `digits@1`."""
    like = own_models.find("digits")
    _publish(own_models, like, "digits")
    _publish(own_models, like, "digits", status="failed")
    _publish(own_models, like, "digits", status="not run")
    return own_models


def test_a_list_shows_aliases_proofs_and_what_is_blocked(repository: Repository) -> None:
    place = str(repository.folder)
    assert "digits@2 is stable now; there was none before" in _run("promote", "digits@2", "--repository", place).output
    listed = _run("list", "--repository", place)
    assert listed.exit_code == 0
    rows = {line.split("│")[1].strip(): line for line in listed.output.splitlines() if "digits" in line}
    assert "stable" in rows["digits@2"]
    assert "100.00%" in rows["digits@1"]
    assert "passed" in rows["digits@1"]
    assert "blocked" in rows["digits@3"]
    assert "not run" in rows["digits@4"]
    records = json.loads(_run("list", "--repository", place, "--json").output)
    assert {(r["model"], r["version"]): r["aliases"] for r in records}["digits", 2] == ["stable"]


def test_a_damaged_version_hides_no_other_from_the_list(repository: Repository) -> None:
    manifest = repository.find("digits", 1).folder / "manifest.json"
    manifest.write_text("{")
    listed = _run("list", "--repository", str(repository.folder))
    assert listed.exit_code == 0
    assert "damaged" in listed.output
    assert "digits@2" in listed.output


def test_what_is_damaged_or_foreign_is_said_or_left_out(repository: Repository) -> None:
    place = str(repository.folder)
    (repository.find("digits", 2).folder / "manifest.json").unlink()
    (repository.folder / "resnet" / "1").mkdir(parents=True)
    (repository.folder / "resnet" / "1" / "model.onnx").touch()
    listed = _run("list", "--repository", place)
    assert listed.exit_code == 0
    assert "resnet" not in listed.output
    assert "damaged: " in listed.output
    assert "digits/2/manifest.json: expected a file of the repository here, found none" in listed.output
    (repository.folder / "digits" / "model.json").write_text("{}")
    listed = _run("list", "--repository", place)
    assert "digits/model.json: expected the aliases and version numbers that were written" in listed.output
    assert "100.00%" in listed.output  # the versions themselves are shown all the same
    records = json.loads(_run("list", "--repository", place, "--json").output)
    assert records[0]["aliases"] is None
    assert "model.json" in records[0]["aliases_error"]
    pruned = _run("prune", "--keep", "1", "--repository", place)
    assert "damaged, and left: digits@2: " in pruned.output
    assert "digits@2: removed" in _run("remove", "digits@2", "--force", "--repository", place).output
    assert repository.versions("digits") == [1, 3, 4]


def test_a_proof_that_cannot_be_recorded_is_not_begun(repository: Repository) -> None:
    place = str(repository.folder)
    with read_only(repository.folder):
        refused = tenet("models", "verify", "digits@1", "--repository", place)
        checked = _run("verify", "digits@1", "--files-only", "--repository", place)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert "expected a repository that can be written to" in line
    assert checked.exit_code == 0


def test_an_alias_names_a_version_in_every_verb(repository: Repository) -> None:
    place = str(repository.folder)
    first = _run("promote", "digits@1", "--alias", "canary", "--repository", place, "--json")
    assert json.loads(first.output) == {"model": "digits", "alias": "canary", "version": 1, "former": None}
    moved = _run("promote", "digits@2", "--alias", "canary", "--repository", place)
    assert "digits@2 is canary now; before, digits@1 was" in moved.output
    assert json.loads(_run("show", "digits@canary", "--repository", place).output)["version"] == 2
    assert "digits@2 is stable now" in _run("promote", "digits@canary", "--repository", place).output
    assert "as before" in _run("promote", "digits@2", "--repository", place).output


def test_one_version_is_removed(repository: Repository) -> None:
    place = str(repository.folder)
    assert "digits@3: removed" in _run("remove", "digits@3", "--repository", place).output
    assert repository.versions("digits") == [1, 2, 4]
    forced = _run("remove", "digits@1", "--force", "--repository", place, "--json")
    assert json.loads(forced.output) == {"model": "digits", "version": 1}


def test_prune_says_what_goes_before_it_goes(repository: Repository) -> None:
    place = str(repository.folder)
    for number in (1, 2, 3):
        os.utime(repository.find("digits", number).folder / "model.onnx", (0, 0))
    planned = _run("prune", "--keep", "1", "--older-than", "4w", "--repository", place, "--dry-run")
    # 1 is the source of digits-int8, 2 the latest servable one, 4 the newest.
    assert planned.output.splitlines() == ["digits@3: would be removed"]
    pruned = _run("prune", "digits", "--keep", "1", "--older-than", "4w", "--repository", place, "--json")
    assert json.loads(pruned.output) == {"versions": ["digits@3"], "remains": [], "damaged": [], "dry_run": False}
    assert repository.versions("digits") == [1, 2, 4]
    assert _run("prune", "--repository", place).output.splitlines() == ["nothing to remove"]


def test_verify_reads_every_byte_first(repository: Repository) -> None:
    place = str(repository.folder)
    checked = _run("verify", "digits@1", "--files-only", "--repository", place)
    assert "files are, byte for byte, those that were published" in checked.output
    assert json.loads(_run("verify", "digits@1", "--files-only", "--json", "--repository", place).output)["files"] > 1
    (repository.folder / "digits" / "labels.txt").write_text("zero\n")
    result = tenet("models", "verify", "digits@1", "--repository", place)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "labels.txt: differs from what this release of tenet writes for the model's versions" in line
    assert _run("prune", "--repository", place).exit_code == 0
    assert _run("verify", "digits@1", "--files-only", "--repository", place).exit_code == 0


def test_verify_completes_the_proof(repository: Repository) -> None:
    result = tenet("models", "verify", "digits-int8", "--repository", str(repository.folder), "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["parity"]["status"] == "passed"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["promote", "digits@3"], "digits@3: not promoted, because it is blocked: "),
        (["promote", "digits@4"], "digits@4: not promoted, because its proof of parity was not run: "),
        (["promote", "digits@2", "--alias", "7"], "alias '7': expected a plain name that is not a number"),
        (["promote", "digits@stable"], "model 'digits' has no alias 'stable'; its aliases are: none"),
        (["remove", "digits"], "'digits': expected NAME@VERSION, the version to remove"),
        (["remove", "digits@9"], "model 'digits' has no version 9; its versions are: 1, 2, 3, 4"),
        (["remove", "digits@1"], "digits@1: not removed, because others were made from it"),
        (["prune", "--older-than", "soon"], "--older-than: expected hours, days or weeks, such as 12h, 30d or 8w"),
        (["prune", "letters", "--keep", "1"], "model 'letters': not in"),
        (
            ["list", "--repository", ""],
            "repository: expected a folder, s3://bucket/prefix or gs://bucket/prefix, got ''",
        ),
        (["show", "digits@x y"], "expected NAME, NAME@VERSION with a whole number, or NAME@ALIAS"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_line(
    arguments: list[str],
    complaint: str,
    repository: Repository,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {path: path.read_bytes() for path in repository.folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(
        "sys.argv", ["tenet", "models", arguments[0], "--repository", str(repository.folder), *arguments[1:]]
    )
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    signal.signal(signal.SIGTERM, handler)
    assert ended.value.code == command_line.BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert complaint in line
    assert {path: path.read_bytes() for path in repository.folder.rglob("*") if path.is_file()} == before
