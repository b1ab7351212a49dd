"""`compare --ray` on a cluster of two machines (as Ray sees them): the records of a local comparison, whoever dies."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from soka_serve.comparison.cluster import check_machine
from soka_serve.comparison.inputs import read_inputs
from soka_serve.comparison.read import read_suite
from soka_serve.io.workspace import HashCache
from tests.conftest import ROOT
from tests.support.builds import run_cli, start_cli
from tests.support.ray_cluster import RayCluster, ray_cluster

pytest.importorskip("ray", reason="Ray is not installed (make venv installs it)")

SUITE = "eval/suites/quick.toml"
MEASURED = ("answer_loss", "other", "batches_sha256", "trainable_parameters", "status")


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster(machines=2, cpus=1) as started:
        yield started


def records(work: Path) -> dict[str, dict[str, Any]]:
    return {file.stem: json.loads(file.read_text()) for file in (work / "records").glob("*.json")}


def _is_head(machine: psutil.Process | None) -> bool:
    return machine is None or "--head" in machine.cmdline()


@pytest.mark.slow
def test_a_killed_process_ctrl_c_and_a_dead_machine_lose_nothing_and_records_are_those_of_one_machine(
    cluster: RayCluster, tmp_path: Path
) -> None:
    work, log, out = tmp_path / "ray", tmp_path / "log", tmp_path / "out.json"
    command = ("compare", SUITE, "--ray", cluster.address, "--work", work, "--out", out, "--limit-runs")
    process = start_cli(*command, 2, cwd=ROOT, log=log)
    while not (running := cluster.processes("ray::_run")):
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    running[0].kill()
    assert process.wait(300) == 0, log.read_text()
    assert "its process died, and it is begun again" in log.read_text()
    found = records(work)
    assert [record["status"] for record in found.values()] == ["done", "done"]
    assert json.loads(out.read_text())["hardware"]["ray_machines"] == 2

    local = run_cli("compare", SUITE, "--work", tmp_path / "local", "--limit-runs", "2", "--jobs", "2", cwd=ROOT)
    assert local.returncode == 0, local.stderr
    alone = records(tmp_path / "local")
    assert {k: [r.get(m) for m in MEASURED] for k, r in found.items()} == {
        k: [r.get(m) for m in MEASURED] for k, r in alone.items()
    }

    process = start_cli(*command, 1, cwd=ROOT, log=log)  # goes on with what is missing
    while not cluster.processes("ray::_run"):
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    process.send_signal(2)
    assert process.wait(60) == 2
    assert "interrupted" in log.read_text()
    assert records(work) == found
    deadline = time.monotonic() + 30
    while cluster.processes("ray::_run"):
        assert time.monotonic() < deadline, "a run goes on after Ctrl-C"
        time.sleep(0.1)

    process = start_cli(*command, 2, cwd=ROOT, log=log)
    while not (others := [m for m in map(psutil.Process.parent, cluster.processes("ray::_run")) if not _is_head(m)]):
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    assert others[0] is not None
    others[0].kill()  # a machine that is gone, with the run on it
    assert process.wait(300) == 0, log.read_text()
    assert "begun again" in log.read_text()
    assert [record["status"] for record in records(work).values()] == ["done"] * 4


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "--ray 127.0.0.1:1: no answer: "),
        ("ray://127.0.0.1:10001", "expected HOST:PORT of the cluster's head, or auto"),
        ("head", "expected HOST:PORT"),
    ],
)
def test_an_address_where_no_cluster_is(tmp_path: Path, address: str, message: str) -> None:
    done = run_cli("compare", SUITE, "--ray", address, "--work", tmp_path / "work", cwd=ROOT)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "work" / "records").exists()


def test_a_machine_that_reads_anything_else_says_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tasks ask before each run, here of this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = (
        (ROOT / SUITE)
        .read_text()
        .replace('data = { builtin = "math", limit = 64 }', 'data = { jsonl = "d.jsonl", eval_jsonl = "e.jsonl" }')
    )
    text = text.replace("loss_targets = [2.0]", 'loss_targets = [2.0]\nanswers = "exact"')
    (tmp_path / "s.toml").write_text(text)
    data = tmp_path / "d.jsonl"
    rows = [json.dumps({"prompt": f"{i} + 1 =", "completion": f" {i + 1}"}) for i in range(64)]
    data.write_text("\n".join(rows))
    (tmp_path / "e.jsonl").write_text("\n".join(rows))
    loaded = read_suite(tmp_path / "s.toml")
    inputs = read_inputs(loaded, HashCache(tmp_path / "hashes.json"))
    assert check_machine(loaded, inputs) is None
    other = replace(inputs, versions=inputs.versions | {"torch": "1.0"}, device="cuda")
    refusal = check_machine(loaded, other)
    assert refusal is not None
    assert "it has torch " in refusal.reason
    assert "instead of 1.0; its device is cpu" in refusal.reason
    data.write_text("\n".join(reversed(rows)))
    refusal = check_machine(loaded, inputs)
    assert refusal is not None
    assert refusal.reason == "data of [[dataset]]: other content under the same path"
    data.unlink()
    refusal = check_machine(loaded, inputs)
    assert refusal is not None
    assert "d.jsonl" in refusal.reason
