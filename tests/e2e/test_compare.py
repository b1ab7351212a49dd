"""The quick suite through the command line: it runs, is killed, goes on, and reports. Who wins is not asked."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.support.builds import run_cli, start_cli

SUITE = "eval/suites/quick.toml"
RUNS = 8  # two settings, and two seeds, for each of two methods


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_cli("compare", *arguments, cwd=ROOT)


def records(work: Path) -> dict[str, dict[str, Any]]:
    return {file.stem: json.loads(file.read_text()) for file in (work / "records").glob("*.json")}


def test_the_dry_run_trains_nothing(tmp_path: Path) -> None:
    done = run(SUITE, "--work", str(tmp_path / "work"), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "8,796 trained parameters" in done.stdout
    assert f"{RUNS} runs; 48 steps" in done.stdout
    assert not (tmp_path / "work").exists()


def test_a_suite_that_is_wrong_is_a_message(tmp_path: Path) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text((ROOT / SUITE).read_text().replace('method = "lora"', 'method = "lara"'))
    done = run(str(file), "--work", str(tmp_path / "work"))
    assert done.returncode == 2
    assert "did you mean 'lora'?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_killed_resumed_limited_and_reported(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "results.json"
    process = start_cli("compare", SUITE, "--work", work, cwd=ROOT, log=tmp_path / "log")
    while not list((work / "records").glob("*.json")):
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.005)
    process.kill()
    process.wait()
    before = {name: (work / "records" / f"{name}.json").stat().st_mtime_ns for name in records(work)}
    assert 1 <= len(before) < RUNS

    limited = run(SUITE, "--work", str(work), "--limit-runs", "1", "--out", str(out))
    assert limited.returncode == 0, limited.stderr
    assert "the same command goes on" in limited.stdout
    assert json.loads(out.read_text())["progress"]["left"] > 0

    finished = run(SUITE, "--work", str(work), "--jobs", "2", "--out", str(out))
    assert finished.returncode == 0, finished.stderr
    after = records(work)
    assert len(after) == RUNS
    assert all(record["status"] == "done" for record in after.values())
    for name, stamp in before.items():  # what was there was not run again
        assert (work / "records" / f"{name}.json").stat().st_mtime_ns == stamp

    again = run(SUITE, "--work", str(work), "--out", str(out))
    assert f"{RUNS} runs done, 0 left, 0 failed" in again.stdout

    results = json.loads(out.read_text())
    assert results["data_order_equal"] is True
    assert {row["name"]: row["trainable_parameters"] for row in results["table"]} == {"soka-r1": 8768, "lora-r1": 9344}
    assert all(row["complete"] and row["accuracy"]["n"] == 2 for row in results["table"])
    assert results["effort_equal"] is True
    assert results["claims_changed_after"] == 0
    assert [(claim["n"], claim["undecided"]) for claim in results["claims"]] == [(8, None)]
    assert {run["stage"] for run in results["runs"]} == {"sweep", "final"}
    for cell in results["cells"]:
        assert cell["setting"] in [{k: v for k, v in tried.items() if k != "score"} for tried in cell["tried"]]
        assert cell["forgetting_of"].keys() == {"easy"}
        assert cell["adapter_bytes"] > 4 * cell["trainable_parameters"]
        assert cell["grad_norm"] > 0
    assert "| soka-r1 |" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".html").read_text().count("<svg") == 4

    elsewhere = run(SUITE, "--work", str(tmp_path / "elsewhere"), "--limit-runs", "0", "--out", str(out))
    assert f"{RUNS} runs done, 0 left, 0 failed" in elsewhere.stdout, elsewhere.stderr
    assert f"{RUNS} runs taken from" in elsewhere.stderr
    assert records(tmp_path / "elsewhere") == after
    lines = out.with_suffix(".records.jsonl")
    lines.write_text(lines.read_text() + "{\n")
    damaged = run(SUITE, "--work", str(tmp_path / "third"), "--limit-runs", "0", "--out", str(out))
    assert damaged.returncode == 2
    assert f"{lines}:{RUNS + 1}: expected a record" in damaged.stderr
