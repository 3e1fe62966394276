"""The page as Prometheus reads it: over HTTP, in both of its formats, parsed by its own parsers."""

from __future__ import annotations

import re
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.core import CounterMetricFamily, Metric, UnknownMetricFamily
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parsed_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parsed_text
from prometheus_client.registry import Collector

from export.engines.base import Images
from service import metrics
from service.client import Client
from service.server import Serving
from service.settings import Metrics, Settings

# What a Prometheus of today asks for.
OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"


class Fixed(Collector):
    """Two families that stay the same."""

    def collect(self) -> Iterator[Metric]:
        yield UnknownMetricFamily("nv_inference_count", "images", value=7)
        yield CounterMetricFamily("tenet_rejected", "requests", value=3)


def fetch(port: int, accept: str = "", *, host: str = "127.0.0.1", query: str = "") -> tuple[str, str]:
    request = urllib.request.Request(
        f"http://{host}:{port}/metrics{query}", headers={"Accept": accept} if accept else {}
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.headers["Content-Type"], response.read().decode()


def test_without_a_wish_the_page_is_text_in_which_triton_s_counters_are_counters() -> None:
    with metrics.page(Metrics(port=0), Fixed()) as port:
        kind, text = fetch(port)
    assert kind.startswith("text/plain")
    families = {family.name: family for family in parsed_text(text)}
    assert families["nv_inference_count"].type == "counter"
    assert "\nnv_inference_count 7.0\n" in text
    assert "\ntenet_rejected_total 3.0\n" in text


def test_a_prometheus_that_asks_gets_openmetrics_that_is_valid() -> None:
    with metrics.page(Metrics(port=0), Fixed()) as port:
        kind, text = fetch(port, OPENMETRICS)
    assert kind.startswith("application/openmetrics-text")
    assert text.endswith("# EOF\n")
    families = {family.name: family for family in parsed_openmetrics(text)}  # type: ignore[no-untyped-call]
    assert families["nv_inference_count"].samples[0].value == 7
    assert families["tenet_rejected"].type == "counter"


def test_the_process_itself_is_on_the_page() -> None:
    with metrics.page(Metrics(port=0)) as port:
        _, text = fetch(port)
    names = {sample.name for family in parsed_text(text) for sample in family.samples}
    assert {"process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds", "python_info"} <= names


def test_a_page_can_be_read_by_several_at_once_and_two_pages_do_not_meet() -> None:
    texts: list[str] = []
    with metrics.page(Metrics(port=0), Fixed()) as first, metrics.page(Metrics(port=0)) as second:
        readers = [threading.Thread(target=lambda: texts.append(fetch(first)[1])) for _ in range(8)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        assert "tenet_rejected" not in fetch(second)[1]
    assert len(texts) == 8
    assert all("tenet_rejected_total 3.0" in text for text in texts)


def test_the_page_is_gone_with_the_block_and_its_port_free() -> None:
    with metrics.page(Metrics(port=0)) as port:
        pass
    with pytest.raises(OSError, match="refused"):
        fetch(port)
    with metrics.page(Metrics(port=port)) as again:
        assert again == port


def test_a_taken_port_is_one_clear_line() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(OSError, match=r"^port \d+ on 127\.0\.0\.1 is in use; choose another as metrics\.port$"),
        metrics.page(Metrics(port=taken.getsockname()[1])),
    ):
        pass


def test_a_host_that_is_not_this_machine_s_is_one_clear_line() -> None:
    with (
        pytest.raises(OSError, match=r"^cannot listen on 192\.0\.2\.1 port 0: .*metrics\.host"),
        metrics.page(Metrics(host="192.0.2.1", port=0)),
    ):
        pass


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_the_page_is_served_by_ipv6_too() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no ::1")
    with metrics.page(Metrics(host="::1", port=0)) as port:
        assert "process_start_time_seconds" in fetch(port, host="[::1]")[1]


def test_what_a_server_answers_is_on_its_page(start: Callable[..., Serving], repository: Path, images: Images) -> None:
    serving = start(repository, Settings(metrics=Metrics(port=0)))
    assert serving.metrics_port is not None
    with Client(serving.address, timeout=20) as client:
        client.infer(images[:3], model="linear", version=2)
    _, text = fetch(serving.metrics_port)
    assert 'nv_inference_request_success{model="linear",version="2"} 1.0' in text
    assert 'nv_inference_count{model="linear",version="2"} 3.0' in text
    assert 'tenet_models{state="READY"}' in text


def test_a_page_can_be_asked_for_some_of_its_families(start: Callable[..., Serving], repository: Path) -> None:
    serving = start(repository, Settings(metrics=Metrics(port=0)))
    assert serving.metrics_port is not None
    wanted = {"nv_inference_count", "tenet_models", "tenet_build_info", "tenet_queue_seconds_sum"}
    _, text = fetch(serving.metrics_port, query="?" + "&".join(f"name[]={name}" for name in wanted))
    assert {re.split("[{ ]", line)[0] for line in text.splitlines() if not line.startswith("#")} == wanted
