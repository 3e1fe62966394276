"""What versions have done, as Prometheus and Grafana see it."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parsed_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parsed

from service import metrics
from service.errors import ResourceExhausted
from service.inference.batching import Execution
from service.inference.families import Families
from service.inference.statistics import Ledger
from service.settings import Metrics

GRAFANA = Path(__file__).parents[3] / "deploy" / "grafana"
BOARD = GRAFANA / "tenet.json"

# https://github.com/triton-inference-server/server/blob/main/docs/user_guide/metrics.md
TRITON = {
    "nv_inference_request_success",
    "nv_inference_request_failure",
    "nv_inference_count",
    "nv_inference_exec_count",
    "nv_inference_request_duration_us",
    "nv_inference_queue_duration_us",
    "nv_inference_compute_input_duration_us",
    "nv_inference_compute_infer_duration_us",
    "nv_inference_compute_output_duration_us",
    "nv_inference_pending_request_count",
    "nv_cache_num_hits_per_model",
    "nv_cache_num_misses_per_model",
    "nv_cache_hit_duration_per_model",
    "nv_cache_miss_duration_per_model",
}


class Entry(NamedTuple):
    state: str


class Line:
    waiting = 4


def index() -> Iterable[Entry]:
    asyncio.get_running_loop()  # it is the event loop that is asked
    return [Entry("READY"), Entry("READY"), Entry("UNAVAILABLE")]


@pytest.fixture
def line() -> Line:
    return Line()


@pytest.fixture
def ledger(line: Line) -> Ledger:
    """One version that has answered a batch of two requests and one from the cache, and refused one."""
    ledger = Ledger()
    statistics = ledger.of("digits", 2, max_batch=6)
    statistics.executed(
        Execution(
            images=5,
            requests=2,
            waited_ns=(150_000, 7_000_000),
            input_ns=10_000,
            infer_ns=2_000_000,
            output_ns=30_000,
            closed_by="idle",
            failed=False,
        )
    )
    for total_ns in (3_000_000, 9_500_000, 20_000):
        statistics.succeeded(total_ns)
    statistics.cache_hit(15_000)
    statistics.cache_miss(25_000)
    statistics.rejected("queue_full")
    statistics.failed(1_000, ResourceExhausted("full"))
    statistics.watch(line)
    return ledger


async def samples(ledger: Ledger) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    registry = CollectorRegistry()
    registry.register(Families(ledger, index=index))
    text = (await asyncio.to_thread(generate_latest, registry)).decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parsed(text)
        for sample in family.samples
    }


def of(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset({"model": "digits", "version": "2", **labels}.items())


async def test_triton_s_names_have_triton_s_meaning(ledger: Ledger) -> None:
    found = await samples(ledger)
    expected = {
        of("nv_inference_request_success"): 3,
        of("nv_inference_request_failure", reason="REJECTED"): 1,
        of("nv_inference_request_failure", reason="CANCELED"): 0,
        of("nv_inference_request_failure", reason="BACKEND"): 0,
        of("nv_inference_request_failure", reason="OTHER"): 0,
        of("nv_inference_count"): 5,
        of("nv_inference_exec_count"): 1,
        of("nv_inference_request_duration_us"): 12_520,
        of("nv_inference_queue_duration_us"): 7_150,
        of("nv_inference_compute_input_duration_us"): 20,
        of("nv_inference_compute_infer_duration_us"): 4_000,
        of("nv_inference_compute_output_duration_us"): 60,
        of("nv_inference_pending_request_count"): 4,
        of("nv_cache_num_hits_per_model"): 1,
        of("nv_cache_num_misses_per_model"): 1,
        of("nv_cache_hit_duration_per_model"): 15,
        of("nv_cache_miss_duration_per_model"): 25,
    }
    assert {key: value for key, value in found.items() if key[0].startswith("nv_")} == expected
    assert {name for name, _ in expected} == TRITON


async def test_histograms_are_in_seconds_and_images(ledger: Ledger) -> None:
    found = await samples(ledger)
    assert found[of("tenet_queue_seconds_bucket", le="0.0001")] == 0
    assert found[of("tenet_queue_seconds_bucket", le="0.00025")] == 1
    assert found[of("tenet_queue_seconds_bucket", le="0.01")] == 2
    assert found[of("tenet_queue_seconds_count")] == 2
    assert found[of("tenet_queue_seconds_sum")] == pytest.approx(0.00715)
    assert found[of("tenet_compute_seconds_sum")] == pytest.approx(0.002)
    assert found[of("tenet_request_seconds_bucket", le="+Inf")] == 3
    assert found[of("tenet_batch_size_bucket", le="4.0")] == 0
    assert found[of("tenet_batch_size_bucket", le="6.0")] == 1
    assert found[of("tenet_batch_size_sum")] == 5


async def test_reasons_are_there_before_they_happen(ledger: Ledger) -> None:
    found = await samples(ledger)
    rejected = {
        dict(labels)["reason"]: value for (name, labels), value in found.items() if name == "tenet_rejected_total"
    }
    assert rejected == {"queue_full": 1, "queue_timeout": 0, "deadline": 0, "cancelled": 0, "closed": 0}
    closed = {
        dict(labels)["reason"]: value for (name, labels), value in found.items() if name == "tenet_batches_closed_total"
    }
    assert closed == {"full": 0, "preferred": 0, "idle": 1, "delay": 0, "next": 0}


async def test_versions_are_counted_by_state(ledger: Ledger) -> None:
    found = await samples(ledger)
    assert found["tenet_models", frozenset({("state", "READY")})] == 2
    assert found["tenet_models", frozenset({("state", "UNAVAILABLE")})] == 1


def _openmetrics(text: str) -> list[Metric]:
    return list(parsed_openmetrics(text))  # type: ignore[no-untyped-call]


async def test_every_family_is_announced_so_that_a_page_can_be_asked_for_some_of_them(ledger: Ledger) -> None:
    families = Families(ledger, index=index)
    announced = {family.name: (family.type, family.documentation) for family in families.describe()}
    read = await asyncio.to_thread(lambda: list(families.collect()))
    assert announced == {family.name: (family.type, family.documentation) for family in read}


async def test_openmetrics_takes_every_family(ledger: Ledger) -> None:
    registry = CollectorRegistry()
    registry.register(Families(ledger, index=index))
    text = (await asyncio.to_thread(generate_openmetrics, registry)).decode()
    names = {sample.name for family in _openmetrics(text) for sample in family.samples}
    assert names >= TRITON


async def test_counts_do_not_go_back_when_a_version_comes_back(ledger: Ledger) -> None:
    ledger.of("digits", 2, max_batch=8).succeeded(1_000)
    assert (await samples(ledger))[of("nv_inference_request_success")] == 4


async def test_a_busy_event_loop_does_not_keep_the_page_from_being_read(ledger: Ledger) -> None:
    families = Families(ledger, index=index)
    names: list[str] = []
    reader = threading.Thread(target=lambda: names.extend(family.name for family in families.collect()))
    reader.start()
    reader.join()  # and the event loop is stuck here meanwhile
    assert set(names) >= TRITON


def _expressions() -> list[str]:
    board = json.loads(BOARD.read_text())
    targets = [target for panel in board["panels"] for target in panel.get("targets", [])]
    queries = [variable["query"]["query"] for variable in board["templating"]["list"] if variable["type"] == "query"]
    return [*(target["expr"] for target in targets), *queries]


async def test_every_query_of_the_board_uses_what_the_real_page_has(ledger: Ledger) -> None:
    with metrics.page(Metrics(port=0), Families(ledger, index=index)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
        answer = (await reader.read()).decode()
        writer.close()
    # The parser would give counters the ending that Triton's lack.
    text = re.sub("# TYPE nv_.*\n", "", answer.partition("\r\n\r\n")[2])
    labels: dict[str, set[str]] = {}
    for family in parsed(text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    expressions = _expressions()
    assert len(expressions) > 10
    for expression in expressions:
        names = set(re.findall(r"\b(?:nv|tenet|process|python)_[a-z0-9_]+", expression))
        assert names, expression
        assert names <= labels.keys(), f"{expression}: {names - labels.keys()}"
        # What Prometheus itself adds.
        known = {"instance", "job"}.union(*(labels[name] for name in names))
        used = {name for group in re.findall(r"\bby \(([^)]*)\)", expression) for name in group.split(", ")}
        used |= {name for group in re.findall(r"{([^}]*)}", expression) for name in re.findall(r"(\w+)=", group)}
        assert used <= known, f"{expression}: {used - known}"
        assert expression.count("(") == expression.count(")")


def test_every_panel_of_the_board_asks_the_chosen_source_and_none_lies_on_another() -> None:
    board = json.loads(BOARD.read_text())
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    (source,) = [each for each in board["templating"]["list"] if each["type"] == "datasource"]
    assert (source["name"], source["query"]) == ("datasource", "prometheus")
    places: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        where = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(where["x"], where["x"] + where["w"])
            for y in range(where["y"], where["y"] + where["h"])
        }
        assert where["x"] + where["w"] <= 24
        assert not cells & places, panel["title"]
        places |= cells
        if panel["type"] != "row":
            assert panel["datasource"] == chosen
            assert panel["title"]
            assert panel["targets"]
    identities = [panel["id"] for panel in board["panels"]]
    assert len(set(identities)) == len(identities)


def _yaml(path: Path) -> Any:
    return pytest.importorskip("yaml").safe_load(path.read_text())


def test_the_files_beside_the_board_name_what_is_there() -> None:
    (provider,) = _yaml(GRAFANA / "provisioning" / "dashboards" / "tenet.yaml")["providers"]
    assert provider["type"] == "file"
    (source,) = _yaml(GRAFANA / "provisioning" / "datasources" / "prometheus.yaml")["datasources"]
    assert source["type"] == "prometheus"
    (job,) = _yaml(GRAFANA.parent / "prometheus" / "prometheus.yml")["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
