"""The documentation: its programs and settings work, its tables are those of the code, its links lead somewhere."""

from __future__ import annotations

import inspect
import re
import shutil
import socket
import tomllib
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args, get_origin
from urllib.request import urlopen

import pytest
import torch
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from typer.main import get_command_from_info

from export.mapping import Mapping
from service import settings
from service.__main__ import app
from service.audit import attack_tables, checks, metric, plan
from service.audit.report import AttackReport, Report
from tests.processes import address, running
from tests.service.certificates import Authority
from training import recipe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from export.repository import Repository

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
EXPORT = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
SERVING = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
PLANS = (ROOT / "docs" / "audit-plans.md").read_text(encoding="utf-8")
AUDITS = (ROOT / "docs" / "audits.md").read_text(encoding="utf-8")
PAGES = sorted(
    page for place in ("*.md", "docs/**/*.md", "deploy/**/*.md", "benchmarks/*.md") for page in ROOT.glob(place)
)

_PROGRAMS = re.compile(r"```python\n(.*?)```(?:\n\n```text output\n(.*?)```)?", re.DOTALL)
_TOML = re.compile(r"```toml\n(.*?)```", re.DOTALL)
_SECTION = re.compile(r"^### `\[(.+)\]`$")
_PARAMETER = re.compile(r"`(\w+)` = (\"[^\"]*\"|\[[^]]*\]|[\w.+-]+)")
_LINK = re.compile(r"\[[^]]*\]\(([^):\s#]*)(?:#([^)\s]+))?\)")

# Sections of a recipe, and of those with several kinds of table the first cell of a kind's rows.
TABLES: dict[tuple[str, str], type[recipe.Section]] = {
    ("data", ""): recipe.Data,
    ("model", '"resnet"'): recipe.ResNet,
    ("model", '"resnext"'): recipe.ResNeXt,
    ("model", '"wide-resnet"'): recipe.WideResNet,
    ("model", '"torchvision/NAME"'): recipe.LibraryModel,
    ("model", '"timm/NAME"'): recipe.LibraryModel,
    ("model", "your own"): recipe.OwnModel,
    ("training", ""): recipe.Training,
    ("augmentation", ""): recipe.Augmentation,
    ("augmentation.augmix", ""): recipe.AugMix,
    ("adversarial", '"free"'): recipe.FreeAdversarial,
    ("adversarial", '"pgd"'): recipe.PgdAdversarial,
    ("tenet", ""): recipe.Tenet,
}
SHARED = {"every", "by name"}  # first cells of rows that are of several kinds
SETTINGS: dict[str, type[BaseModel]] = {
    "server": settings.Server,
    "models": settings.Models,
    "batching": settings.Batching,
    "engine": settings.Engine,
    "images": settings.Images,
    "cache": settings.Cache,
    "shared_memory": settings.SharedMemory,
    "tls": settings.Tls,
    "auth": settings.Auth,
    "[auth.tokens]": settings.Token,
    "[auth.certificates]": settings.ClientCertificate,
    "metrics": settings.Metrics,
    "logging": settings.Logging,
    "tracing": settings.Tracing,
    "model.NAME": settings.PerModel,
}

# Tables of an audit plan whose keys stand in tables of their own.
PLAN: dict[str, type[BaseModel]] = {
    "target": plan.Target,
    "data": plan.Data,
    "corruptions": plan.Corruptions,
    "differential": plan.Differential,
    "checks": plan.Checks,
    "sequential": plan.Sequential,
}
ATTACKS: tuple[type[attack_tables.Table], ...] = get_args(get_args(plan.Attack)[0])

CHOICES = (recipe.DataName, recipe.Optimizer, recipe.Schedule, recipe.Variant, recipe.Precision)


def documented(page: str = PAGE) -> dict[tuple[str, str], dict[str, str]]:
    """A page's tables of keys: for each section and kind, the default that is given for each key."""
    tables: dict[tuple[str, str], dict[str, str]] = {}
    section, kind = "", ""
    for line in page.splitlines():
        if line.startswith("#"):
            section, kind = (match[1] if (match := _SECTION.match(line)) else ""), ""
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not section or not line.startswith("|") or cells[-1] in {"meaning", "---"}:
            continue
        *kinds, key, default, _ = cells
        kind = kinds[0].replace("`", "") or kind if kinds else ""
        table = tables.setdefault((section, kind), {})
        assert key not in table, f"{section}: {key} stands twice"
        table |= {key.strip("`"): default} if key else {}
    return tables


def keys(section: str, kind: str) -> dict[str, str]:
    tables = documented()
    shared = {name: tables.get((section, name), {}) for name in SHARED}
    if kind == "your own":  # named by its factory
        del shared["by name"]
    return {key: default for table in shared.values() for key, default in table.items()} | tables[section, kind]


def value(default: str) -> object:
    """What a default in the page stands for; fractions are numbers."""
    if default in {"none", "required"}:
        return default
    decoded = tomllib.loads(f"value = {default.strip('`')}")["value"]
    if isinstance(decoded, str) and "/" in decoded:
        return float(Fraction(decoded))
    return tuple(decoded) if isinstance(decoded, list) else decoded


@pytest.mark.parametrize(("section", "kind"), TABLES, ids=" ".join)
def test_the_page_has_every_key_of_a_recipe_and_its_default(section: str, kind: str) -> None:
    fields = dict(TABLES[section, kind].model_fields)
    page = keys(section, kind)
    assert sorted(page) == sorted(fields)
    for key, default in page.items():
        if (
            key == "name" and kind != '"resnet"' and section == "model"
        ):  # what chooses the kind; given but for the first
            continue
        real = fields[key].default
        real = "required" if real is PydanticUndefined else "none" if real is None else real
        assert value(default) == real, f"[{section}] {key}"


def test_the_page_has_no_other_section_or_kind() -> None:
    kinds = {*TABLES} | {(section, name) for section, name in documented() if name in SHARED}
    assert documented().keys() == kinds
    top = {section.partition(".")[0] for section, _ in TABLES}
    assert top == {*recipe.Recipe.model_fields}


@pytest.mark.parametrize("name", [name for choices in CHOICES for name in get_args(choices)])
def test_the_page_has_every_choice(name: str) -> None:
    assert f'`"{name}"`' in PAGE


def test_the_page_has_every_recipe_that_is_shipped() -> None:
    shipped = {path.name for path in (ROOT / "configs").glob("*.toml") if "[training]" in path.read_text()}
    regimes = PAGE.partition("### Regimes of the paper")[2].partition("\n## ")[0]
    assert set(re.findall(r"`([\w-]+\.toml)`", regimes)) == shipped


@pytest.mark.parametrize(("program", "output"), [*_PROGRAMS.findall(PAGE), *_PROGRAMS.findall(EXPORT)])
def test_a_program_of_a_page_runs(
    program: str, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        exec(compile(program, "docs", "exec"), {"__name__": "__main__"})
    if output:
        assert capsys.readouterr().out.split() == output.split()


@pytest.mark.parametrize("section", SETTINGS)
def test_the_page_on_serving_has_every_setting_and_its_default(section: str) -> None:
    fields = SETTINGS[section].model_fields
    page = documented(SERVING)[section, ""]
    assert sorted(page) == sorted(fields)
    for key, default in page.items():
        real = fields[key].default
        real = "required" if real is PydanticUndefined else "none" if real is None else real
        assert value(default) == real, f"[{section}] {key}"


def test_the_page_on_serving_has_no_other_table_of_settings() -> None:
    assert documented(SERVING).keys() == {(section, "") for section in SETTINGS}
    assert {section.partition(".")[0].strip("[") for section in SETTINGS} == {*settings.Settings.model_fields}


@pytest.mark.parametrize("section", SETTINGS)
def test_the_page_on_serving_has_every_choice_of_a_setting(section: str) -> None:
    text = SERVING.partition(f"### `[{section}]`\n")[2].partition("\n#")[0]
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    for key, field in SETTINGS[section].model_fields.items():
        choices = [each for part in (field.annotation, *get_args(field.annotation)) for each in _choices(part)]
        for choice in choices:
            assert f'"{choice}"' in rows[key], f"[{section}] {key}"


def _choices(annotation: object) -> tuple[str, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


@pytest.mark.parametrize(
    "text",
    [*_TOML.findall(SERVING), *(path.read_text(encoding="utf-8") for path in (ROOT / "configs").glob("service*.toml"))],
)
def test_settings_of_the_page_on_serving_and_of_configs_can_be_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "service.toml").write_text(text)
    assert settings.read(tmp_path / "service.toml", environment={}) != settings.Settings()


class Served(NamedTuple):
    """Where a server answers, and where its page of metrics is."""

    address: str
    metrics: str


@pytest.fixture(scope="module")
def served(digits_models: Repository, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The server that the page on serving talks to."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(digits_models.folder, folder / "models")
    models = type(digits_models)(folder / "models")
    models.promote(models.find("digits"))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        metrics = probe.getsockname()[1]
    (folder / "service.toml").write_text(f"shared_memory.enabled = true\nmetrics.port = {metrics}\n")
    arguments = ["--repository", str(models.folder), "--port", "0", "--settings", str(folder / "service.toml")]
    with running(folder / "log", "serve", *arguments) as server:
        yield Served(address(server), f"http://127.0.0.1:{metrics}/metrics")


@pytest.fixture
def _certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that a program of the page reads, in the folder where it runs."""
    authority = Authority()
    us = authority.client("us")
    for name, content in {"ca.pem": authority.certificate, "us.pem": us.certificate, "us.key": us.key}.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_certificates")
@pytest.mark.parametrize(("program", "output"), _PROGRAMS.findall(SERVING))
def test_a_program_of_the_page_on_serving_runs(
    program: str, output: str, served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(compile(program.replace("127.0.0.1:8001", served.address), "docs", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.split() == output.split()


def test_the_page_on_serving_has_every_metric(served: Served) -> None:
    with urlopen(served.metrics) as page:
        names = set(re.findall(r"^# TYPE ((?:nv|tenet)_\w+) ", page.read().decode(), re.MULTILINE))
    table = SERVING.partition("| name | labels | what |")[2].partition("\n\n")[0]
    told = {name for line in table.splitlines() for name in re.findall(r"`((?:nv|tenet)_\w+)`", line)}
    assert told == names


def test_the_page_on_export_has_every_flag_of_its_commands_or_says_where_they_are() -> None:
    """Flags that the page names exist; those of a foreign graph's meaning all stand in its table."""
    commands = {name: _flags(name) for name in ("export", "import")}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", EXPORT.split("```", 2)[2]))  # after the drawing
    of_models = {"--help", "--files-only", "--alias", "--older-than", "--keep", "--dry-run", "--force"}
    assert named - of_models <= commands["export"] | commands["import"]
    table = EXPORT.partition("| flag | key |")[2].partition("\n\n")[0]
    of_meaning = {"--" + name.replace("_", "-") for name in Mapping.model_fields} - {"--input", "--output"}
    assert set(re.findall(r"--[a-z][a-z-]*", table)) == of_meaning | {"--input-name", "--output-name"}


def _flags(verb: str) -> set[str]:
    command = next(one for one in app.registered_commands if one.name == verb)
    return {
        flag
        for parameter in get_command_from_info(command, pretty_exceptions_short=False, rich_markup_mode=None).params
        for flag in parameter.opts
    }


@pytest.mark.parametrize("table", PLAN)
def test_the_page_on_plans_has_every_key_and_its_default(table: str) -> None:
    fields = PLAN[table].model_fields
    page = documented(PLANS)[table, ""]
    assert sorted(page) == sorted(fields)
    for key, default in page.items():
        real = fields[key].default
        real = "required" if real is PydanticUndefined else "none" if real is None else real
        assert value(default) == real, f"[{table}] {key}"


def test_the_page_on_plans_has_no_other_table() -> None:
    assert documented(PLANS).keys() == {(table, "") for table in {*PLAN, "[attacks]"}}
    assert {*PLAN, "attacks", "gates"} == {*plan.Plan.model_fields}
    assert "`[gates]`" in PLANS


def attacks() -> dict[str, dict[str, str]]:
    """The page's attacks by name, each with its own parameters and their defaults."""
    section = PLANS.partition("\n## Attacks\n")[2].partition("\n## ")[0]
    found: dict[str, dict[str, str]] = {}
    for line in section.splitlines():
        if line.startswith("| `"):
            first, *rest = line.strip("|").split("|")
            for name in re.findall(r"`(\w+)`", first):
                assert name not in found, f"{name} stands twice"
                found[name] = dict(_PARAMETER.findall("|".join(rest)))
    return found


def _names(family: type[BaseModel]) -> tuple[str, ...]:
    return get_args(family.model_fields["name"].annotation)


def test_the_page_on_plans_has_every_attack_and_no_other() -> None:
    assert sorted(attacks()) == sorted(name for family in ATTACKS for name in _names(family))


@pytest.mark.parametrize("family", ATTACKS, ids=lambda family: family.__name__)
def test_the_page_on_plans_has_every_parameter_of_an_attack_and_its_default(family: type[BaseModel]) -> None:
    shared = set(documented(PLANS)["[attacks]", ""])
    own = {key: field for key, field in family.model_fields.items() if key not in shared}
    for name in _names(family):
        page = attacks()[name]
        targeted = name not in {"LinfAPGD", "L2APGD"}
        assert set(page) - shared == {key for key in own if key != "targets" or targeted}, name
        for key, default in page.items():
            real = family.model_fields[key].default
            assert real is None or value(default) == real, f"{name}: {key}"


def test_the_page_on_plans_has_every_choice_of_a_key_of_attacks() -> None:
    section = PLANS.partition("### `[[attacks]]`\n")[2].partition("\n#")[0]
    rows = {line.split("`")[1]: line for line in section.splitlines() if line.startswith("| `")}
    for key in ("access", "gradients", "decisions", "suite"):
        choices = {
            choice
            for family in ATTACKS
            if key in family.model_fields
            for choice in _choices(family.model_fields[key].annotation)
        }
        assert {choice for choice in choices if f'"{choice}"' not in rows[key]} == set(), key


def test_the_page_on_plans_has_every_metric_of_gates_and_no_other() -> None:
    table = PLANS.partition("| metric | what it is |")[2].partition("\n\n")[0]
    told = {line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| `")}
    names = [re.findall(r"`(\w+)((?:\[[^]]*\])?)`", cell) for cell in told]
    forms = {(name, brackets.count('"') // 2) for cell in names for name, brackets in cell}
    assert forms == {(name, len(keys)) for name, form in metric._FORMS.items() for keys in form.keys}


def test_the_page_on_plans_says_of_every_warning_what_the_code_says() -> None:
    table = PLANS.partition("| code | raised if | explanation |")[2].partition("\n\n")[0]
    told = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "`" in line]
    assert [code for code, _, _ in told] == [f"`{check.__name__}`" for check in (*checks.CHECKS, *checks.CONTESTS)]
    for check, (_, raised, explanation) in zip((*checks.CHECKS, *checks.CONTESTS), told, strict=True):
        said = " ".join((inspect.getdoc(check) or "").split()).casefold()
        assert f"raised if: {raised} explanation: {explanation}".casefold() in said, check.__name__


@pytest.mark.parametrize("text", [*_TOML.findall(PLANS), *_TOML.findall(AUDITS)])
def test_a_plan_of_a_page_can_be_read(text: str) -> None:
    assert plan.parse(text).attacks


@pytest.mark.usefixtures("own_models")
@pytest.mark.parametrize(("program", "output"), _PROGRAMS.findall(AUDITS))
def test_a_program_of_the_page_on_audits_runs(
    program: str, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "docs", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.split() == output.split()


def test_the_page_on_audits_has_every_key_of_a_report() -> None:
    for section, told in ((Report, "\n| `schema`"), (AttackReport, "\n| `results`")):
        table = AUDITS.partition(told)[2].partition("\n\n")[0]
        first = [line.split("|")[1] for line in (told.strip() + table).splitlines()]
        keys = {name for cell in first for name in re.findall(r"`(\w+)`", cell)}
        named = {"id", "name", "access", "norm", "n", "unrounded"}  # said in the text, or by themselves
        real = {field.alias or name for name, field in section.model_fields.items()}
        assert keys | named == real | named, section.__name__


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for path, anchor in _LINK.findall(text):
        target = page.parent / path if path else page
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
