"""`soka-serve serve` as a user runs it: build two manifests, serve both, ask both with the openai client, stop it.

One server answers most tests; they are in the order of its life.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from soka_serve.adapter.format import read_adapter, write_adapter
from soka_serve.builtin import base_directory
from soka_serve.builtin.tasks import check_answer, generate
from soka_serve.io.lockfile import read_lock
from soka_serve.kron import Factors
from tests.conftest import NEEDS_VLLM
from tests.support.builds import run_cli, write_manifest
from tests.support.serve_command import START_S, Command, samples, wait_for_requests
from tests.support.serving import ONE_PROCESS, Server
from tests.support.shared import PROBLEMS, STEPS, copy_skill, skill_manifest

pytestmark = [pytest.mark.slow, NEEDS_VLLM]

SERVE = """\
[serve]
max_model_len = 1024
dtype = "float32"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """math.toml and code.toml, built, and more in the folder of builds: another adapter, a broken one, links."""
    folder = tmp_path_factory.mktemp("serve")
    for family in STEPS:
        copy_skill(tmp_path_factory, family, folder)
        (folder / f"{family}.toml").write_text(skill_manifest(family, SERVE))
    build = folder / "build"
    shutil.copytree(build / "math" / "adapter", build / "late")
    shutil.copytree(build / "math" / "adapter", build / "flat")
    shutil.copytree(build / "math" / "adapter", folder / "outside")
    shutil.copytree(build / "math" / "adapter", build / "broken" / "adapter")
    weights = build / "broken" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    (build / "linked").symlink_to(folder / "outside")
    (build / "mixed").mkdir()
    shutil.copy(folder / "outside" / "adapter_config.json", build / "mixed")
    (build / "mixed" / "adapter_model.safetensors").symlink_to(folder / "outside" / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def command(folder: Path) -> Iterator[Command]:
    arguments = ("math.toml", "code.toml", "--builds", "build", "--", "--max-num-seqs", "64")
    running = Command(folder, *arguments, fresh=True)
    try:
        running.wait_ready()
        yield running
    finally:
        running.end()


@pytest.fixture(scope="module")
def client(command: Command) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{command.url}/v1", api_key="none", max_retries=0, timeout=300)


def _answers(client: openai.OpenAI, model: str, prompts: list[str]) -> list[str]:
    def ask(prompt: str) -> str:
        return client.completions.create(model=model, prompt=prompt, max_tokens=128, temperature=0).choices[0].text

    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(ask, prompts))


def test_each_adapter_has_its_skill(folder: Path, client: openai.OpenAI, command: Command) -> None:
    """As many right answers as transformers gave for the same adapter on the same problems, to one point."""
    assert {card.id for card in client.models.list()} == {"tiny", "math", "code"}
    right: dict[tuple[str, str], int] = {}
    problems = {family: generate(family, "test", PROBLEMS) for family in STEPS}
    models = ["math", "code", "tiny"]
    pairs = [(family, model) for family in STEPS for model in models if model in (family, "tiny")]
    with ThreadPoolExecutor(len(pairs)) as pool:  # both adapters and the base in one batch
        jobs = {pair: pool.submit(_answers, client, pair[1], [p.prompt for p in problems[pair[0]]]) for pair in pairs}
        for (family, model), job in jobs.items():
            marks = [check_answer(p, text) for p, text in zip(problems[family], job.result(), strict=True)]
            right[family, model] = sum(marks)
    for family in STEPS:
        check = json.loads((folder / "build" / family / "check.json").read_text())
        before, after = check["before"]["correct"], check["after"]["correct"]
        assert check["after"]["total"] == PROBLEMS
        assert after > 0.5 * PROBLEMS
        assert abs(right[family, family] - after) <= 1, (family, right, after)
        assert abs(right[family, "tiny"] - before) <= 1, (family, right, before)
        assert right[family, family] - right[family, "tiny"] > 0.4 * PROBLEMS


def test_the_printed_lines_work(command: Command, folder: Path) -> None:
    lines = command.text.splitlines()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for name in ("math", "code"):
        curl, python = lines[lines.index(f"# {name}") + 1 :][:2]
        assert curl.startswith(f"curl {command.url}/v1/completions")
        assert python.startswith("python -c ")
        said = []
        for line in (curl, python):
            done = subprocess.run(
                ["bash", "-c", line], capture_output=True, text=True, timeout=120, check=False, env=environment
            )
            assert done.returncode == 0, done.stderr
            said.append(done.stdout)
        # Both ask the same; the prompt is a held-out one of the build's.
        assert json.loads(said[0])["choices"][0]["text"] == said[1].removesuffix("\n")
        problem = generate(name, "test", 1)[0]
        assert json.loads(said[0])["model"] == name
        assert json.dumps(problem.prompt)[1:-1] in curl.replace("'\"'\"'", "'")
    assert "moves log-probabilities by up to" in command.text
    # vLLM's log is not in the builds, whose folders are replaced as a whole.
    assert command.log.exists()
    assert not list((folder / "build").rglob("*.log"))


def test_a_second_server_on_the_port_is_refused_at_once(command: Command, folder: Path) -> None:
    done = run_cli("serve", "math.toml", "--port", str(command.port), cwd=folder)
    assert done.returncode == 2
    assert f"port {command.port} of 127.0.0.1 is in use" in done.stderr
    assert "starting vLLM" not in done.stderr


def test_builds_are_found_by_name(client: openai.OpenAI) -> None:
    prompts = [problem.prompt for problem in generate("math", "test", 4)]
    late = _answers(client, "late", prompts)
    assert late == _answers(client, "math", prompts)
    assert late != _answers(client, "tiny", prompts)
    assert "late" in {card.id for card in client.models.list()}

    for name in (
        "nowhere",
        "../build/math",
        "..",
        ".",
        "math/adapter",
        "/etc",
        ".cache",
        "late\x00",
        "linked",
        "mixed",
    ):
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.completions.create(model=name, prompt="x", max_tokens=1)
    known = r"Did you mean `late`\? The base is tiny; adapters: broken, code, flat, late, math"
    with pytest.raises(openai.NotFoundError, match=known):
        client.completions.create(model="lte", prompt="x", max_tokens=1)
    with pytest.raises(openai.NotFoundError, match=known):
        client.chat.completions.create(model="lte", messages=[{"role": "user", "content": "x"}], max_tokens=1)
    with pytest.raises(openai.BadRequestError, match=r"adapter_model\.safetensors") as refused:
        client.completions.create(model="broken", prompt="x", max_tokens=1)
    assert "could not be loaded" in str(refused.value)
    assert _answers(client, "math", prompts) == late


def test_loads_from_elsewhere_are_refused(command: Command, folder: Path) -> None:
    server = Server(command.url, command.log)
    for path in (
        folder / "outside",
        folder / "build" / "linked",
        folder / "build" / "mixed",
        folder / "build" / "math" / ".." / ".." / "outside",
        "owner/name",
        "/etc",
        folder / "nowhere",
    ):
        status, answer = server.load("elsewhere", path)
        assert status == 400, (path, answer)
    assert "SOKA_ADAPTER_ROOTS" in str(answer)
    assert server.load("again", folder / "build" / "code" / "adapter")[0] == 200
    assert server.unload("again")[0] == 200


def test_metrics(command: Command, client: openai.OpenAI) -> None:
    before = samples(command.url)
    prompt = generate("math", "test", 1)[0].prompt
    used = [client.completions.create(model=m, prompt=prompt, max_tokens=7).usage for m in ("math", "math", "tiny")]
    prompt_tokens = used[0].prompt_tokens if used[0] else 0
    left, aborted = 0, 0.0
    while aborted == 0:
        # Clients that go away. On a busy machine vLLM's API process (with and without this plugin) may send nothing
        # before the last token is there, so that a client leaves too late; each must be counted all the same, once.
        assert left < 100, "no client's leaving was counted as an abort"
        stream = client.completions.create(
            model="code", prompt=prompt, max_tokens=900, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
        left += 1
        aborted, too_late = wait_for_requests(command.url, before, "code", left)
    assert aborted == 1
    assert too_late == left - 1
    after = samples(command.url)

    def grown(name: str, labels: str) -> float:
        return after.get((name, labels), 0) - before.get((name, labels), 0)

    finished = sum(grown("soka:requests_total", f'adapter="math",reason="{reason}"') for reason in ("stop", "length"))
    assert finished == 2
    assert grown("soka:prompt_tokens_total", 'adapter="math"') == 2 * prompt_tokens
    assert grown("soka:prompt_tokens_total", 'adapter="__base__"') == prompt_tokens
    generated = [u.completion_tokens for u in used if u]
    assert grown("soka:generation_tokens_total", 'adapter="math"') == sum(generated[:2])
    assert grown("soka:generation_tokens_total", 'adapter="__base__"') == generated[2]
    assert grown("soka:generation_tokens_total", 'adapter="code"') >= 1

    in_slot = {labels for name, labels in after if name == "soka:adapter_in_slot"}
    assert in_slot >= {'adapter="math",engine="0",rank="0"', 'adapter="code",engine="0",rank="0"'}
    worker = 'engine="0",rank="0"'
    assert {labels: value for (name, labels), value in after.items() if name == "soka:slots"} == {worker: 8.0}
    assert after["soka:slots_used", worker] == len(in_slot)
    assert after["soka:adapters_in_memory", worker] == len(in_slot)  # as many places as slots
    assert after["soka:slot_fills_total", worker] >= len(in_slot)
    assert after["soka:slot_bytes", worker] > 0
    assert after["soka:adapter_reads_total", worker] >= len(in_slot)
    assert after["soka:adapter_read_seconds_total", worker] > 0

    loaded, refused = (("soka:adapter_load_seconds_count", f'outcome="{o}"') for o in ("loaded", "refused"))
    assert after[loaded] >= len(in_slot)
    assert after["soka:adapter_load_seconds_sum", 'outcome="loaded"'] > 0
    for model, counted in (("broken", refused), ("flat", loaded)):
        count = samples(command.url).get(counted, 0)
        with contextlib.suppress(openai.BadRequestError):
            client.completions.create(model=model, prompt=prompt, max_tokens=1)
        assert samples(command.url)[counted] == count + 1
    assert 'adapter="flat",engine="0",rank="0"' in {labels for _, labels in samples(command.url)}


def test_ctrl_c_ends_it_and_leaves_nothing_behind(command: Command) -> None:
    assert len(command.group()) >= 2  # the API process and the engine's
    command.process.send_signal(signal.SIGINT)
    assert command.wait() == 0
    assert "SIGINT: ending vLLM" in command.text
    assert command.group() == []
    assert "Traceback" not in command.text


def test_an_adapter_without_effect_stops_it(folder: Path, tmp_path: Path) -> None:
    adapter = read_adapter(folder / "build" / "math" / "adapter")
    zero = {name: Factors(f.left, f.right, 0 * f.sigma) for name, f in adapter.factors.items()}
    lock = read_lock(adapter.directory / "soka.lock")
    write_adapter(tmp_path / "zero", zero, base_model=str(base_directory()), lock=lock)
    targets = [f"good={folder / 'build' / 'code'}", f"idle={tmp_path / 'zero'}"]
    running = Command(tmp_path, *targets, "--", "--max-model-len", "64", **ONE_PROCESS)  # the probe is cut to fit
    try:
        assert running.wait() == 2, running.text
        assert "'idle' has no effect" in running.text
        assert "'good' has no effect" not in running.text
        assert "soka-serve inspect" in running.text
        assert "ready after" not in running.text
        assert running._groups
        assert running.group() == []
    finally:
        running.end()


def test_several_api_processes_and_engines_know_the_adapters(folder: Path, tmp_path: Path) -> None:
    target = f"math={folder / 'build' / 'math'}"
    counts = ("--api-server-count", "2", "--data-parallel-size", "2")
    running = Command(tmp_path, target, "--", *counts, "--max-model-len", "256")
    try:
        running.wait_ready()
        deadline = time.monotonic() + START_S
        loads = ("soka:adapter_load_seconds_count", 'outcome="loaded"')
        while samples(running.url).get(loads) != 2:  # one process may answer before the other listens
            assert time.monotonic() < deadline, running.log.read_text()[-3000:]
            time.sleep(0.5)
        running_there = set(map(str, running.group()))
        for kind in ("ApiServer_", "EngineCore_DP"):
            told = set(re.findall(rf"\({kind}\d pid=(\d+)\)", running.log.read_text()))
            assert len(told & running_there) == 2, kind
        prompt = generate("math", "test", 1)[0].prompt
        said = set()
        for _ in range(20):  # a connection each, which either process may take
            client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=300)
            said.add(tuple(_answers(client, model, [prompt])[0] for model in ("math", "tiny", "-2*math")))
            client.close()
        assert len(said) == 1
        assert len(set(said.pop()[:2])) == 2
        for _ in range(8):  # either process may answer
            told = {labels for name, labels in samples(running.url) if name == "soka:slots"}
            assert told == {f'engine="{engine}",rank="0"' for engine in (0, 1)}
    finally:
        running.end()
    assert running.group() == []


def test_what_vllm_refuses_is_shown(folder: Path) -> None:
    running = Command(folder, "math.toml", "--", "--no-such-option")
    try:
        assert running.wait() == 2
        assert "unrecognized arguments: --no-such-option" in running.text
        assert str(running.log) in running.text
        assert "Traceback" not in running.text
    finally:
        running.end()


def test_a_merged_model_and_a_kill(tmp_path: Path) -> None:
    """Served without the plugin; when soka-serve itself is killed, vLLM goes too."""
    manifest = write_manifest(tmp_path, steps=10, learning_rate=8.0, replace=('["adapter", "merged"]', '["merged"]'))
    assert run_cli("build", manifest, cwd=tmp_path).returncode == 0
    running = Command(tmp_path, manifest, "--", "--max-model-len", "128", "--enforce-eager")
    try:
        running.wait_ready()
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", timeout=120)
        prompt = generate("math", "test", 1)[0].prompt
        answer: Any = client.completions.create(model="small", prompt=prompt, max_tokens=8, temperature=0)
        assert answer.choices[0].text
        assert "vllm.soka" not in running.log.read_text()
        assert "soka:" not in urllib.request.urlopen(f"{running.url}/metrics", timeout=60).read().decode()
        assert running.group()
        running.process.kill()
        running.wait()
        deadline = time.monotonic() + 180
        while running.group():
            assert time.monotonic() < deadline, "vLLM outlived soka-serve"
            time.sleep(0.5)
    finally:
        for pid in running.group():
            os.kill(pid, signal.SIGKILL)
        running.end()


def test_doctor_finds_everything_here(tmp_path: Path) -> None:
    done = run_cli("doctor", "--json", cwd=tmp_path)
    said = json.loads(done.stdout)
    states = {check["name"]: check["state"] for check in said["checks"]}
    assert done.returncode == 0, said
    assert states["vllm import"] == "ok"  # in a child process, where the plugin compared vLLM's functions
    assert states["peft"] == "ok"
    assert said["ok"] is True
