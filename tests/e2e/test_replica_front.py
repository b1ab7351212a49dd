"""What stands around the servers of replicas, on Ray Serve and with a stand-in for vLLM: routing, deaths, streams."""

from __future__ import annotations

import itertools
import json
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.support.replicas import Application, replicas, wait_until

pytest.importorskip("ray", reason="Ray is not installed (make venv installs it)")
pytestmark = pytest.mark.slow
SLOTS = 2


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    arguments = {"targets": ["none"], "replicas": 2, "vllm": ["--max-loras", str(SLOTS)], "cpus": 0.1}
    folder = tmp_path_factory.mktemp("front")
    with replicas(folder, arguments, "tests.support.stand_in_app:app") as started:
        wait_until(lambda: len(servers(started)) == 2)
        yield started


def servers(application: Application) -> list[psutil.Process]:
    return application.processes(f"{sys.executable} -m tests.support.stand_in_vllm")


def ask(application: Application, name: str, stream: bool = False) -> str:
    """The port of the server that answered; "cut" for a stream that ends with an error event."""
    request = urllib.request.Request(
        application.url + "/v1/completions",
        json.dumps({"model": name, "stream": stream}).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as reply:
        text = reply.read().decode()
    if not stream:
        assert json.loads(text)["model"] == name
        return str(json.loads(text)["port"])
    events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    if events[-1] != "[DONE]":
        assert json.loads(events[-1])["error"]["code"] == 503
        return "cut"
    assert len(events) == 6
    return str(json.loads(events[0])["port"])


def misses(served: list[tuple[str, str]]) -> int:
    """How many requests came to a server that had been asked for two other adapters since it last had this one."""
    held: dict[str, list[str]] = {}
    count = 0
    for name, port in served:
        known = held.setdefault(port, [])
        if name in known:
            known.remove(name)
        else:
            count += 1
        held[port] = [*known, name][-SLOTS:]
    return count


def test_an_adapter_is_asked_where_it_is_and_refusals_pass(application: Application) -> None:
    names = ["a0", "a1", "a2", "a3"]
    for name in names:
        ask(application, name)
        time.sleep(1)  # until what a replica holds is known
    served = [(name, ask(application, name, stream=i % 2 == 1)) for i in range(10) for name in names]
    assert len({port for _, port in served}) == 2
    # Four adapters on twice two slots. By load alone a server would have had another two than it is asked for in half
    # of the cases.
    assert misses(served) <= len(served) // 4, served
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: ask(application, "base"), range(24)))) == 2
    assert application.post("/v1/completions", {"model": "b"}) == (
        404,
        {"error": {"message": "The model `b` does not exist.", "code": 404}},
    )
    status, reply = application.load("x", "/nowhere")
    assert status == 400
    assert "every replica loads adapters of the application's `builds` folder" in reply["error"]["message"]


def test_metrics_of_all_replicas_are_one_page(application: Application) -> None:
    def page() -> Metric:
        with urllib.request.urlopen(application.url + "/metrics", timeout=60) as reply:
            assert reply.headers["content-type"].startswith("text/plain")
            (family,) = text_string_to_metric_families(reply.read().decode())
        return family

    wait_until(lambda: len(page().samples) == 2, timeout_s=60)
    family = page()
    assert (family.name, family.documentation, family.type) == ("port", "Its own.", "gauge")
    ports = {str(int(sample.value)) for sample in family.samples}
    assert ports == {process.cmdline()[-1] for process in servers(application)}
    assert {sample.labels["model_name"] for sample in family.samples} == {"base"}
    assert len({sample.labels["replica"] for sample in family.samples}) == 2


@pytest.mark.parametrize("killed", ["replica", "server"])
def test_a_death_loses_no_request(application: Application, killed: str) -> None:
    before = {process.pid for process in servers(application)}
    victims = application.replicas() if killed == "replica" else servers(application)

    def one(number: int) -> str:
        if number == 20:
            victims[0].kill()
        return ask(application, f"a{number % 4}", stream=number % 5 == 4)

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(one, range(80)))
    assert found.count("cut") <= 6  # those of which a part was out
    assert all(found[number] != "cut" for number in range(80) if number % 5 != 4)
    wait_until(lambda: len(servers(application)) == 2 and {p.pid for p in servers(application)} != before)
    assert len(before & {process.pid for process in servers(application)}) == 1  # no server outlives its replica


@pytest.mark.slow_matrix
def test_scaling_by_load_loses_no_request(tmp_path: Path) -> None:
    """One replica, two while requests wait, one again while a few still come."""
    scale = {"replicas": 1, "max_replicas": 2, "target_requests": 2, "add_after_s": 1, "remove_after_s": 3}
    arguments = {"targets": ["none"], "vllm": ["--max-loras", str(SLOTS)], "cpus": 0.1, **scale}
    with replicas(tmp_path, arguments, "tests.support.stand_in_app:app") as scaled, ThreadPoolExecutor(12) as pool:
        clients, numbers = 12, itertools.count()
        found: list[str] = []

        def client(place: int) -> None:
            while place < clients:
                number = next(numbers)
                found.append(ask(scaled, f"a{number % 4}", stream=number % 2 == 1))

        assert len(servers(scaled)) == 1
        running = [pool.submit(client, place) for place in range(clients)]
        try:
            wait_until(lambda: len(servers(scaled)) == 2, timeout_s=120)
            both = len(found)
            wait_until(lambda: len(set(found[both:]) - {"cut"}) == 2, timeout_s=60)
            clients = 1
            wait_until(lambda: len(servers(scaled)) == 1, timeout_s=120)
            after = len(found)
            wait_until(lambda: len(found) > after + 3, timeout_s=60)
        finally:
            clients = 0
        for one in running:
            one.result()
    assert "cut" not in found
