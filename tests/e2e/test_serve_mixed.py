"""Kronecker adapters, ordinary LoRA and the base on one real server over HTTP, alone and in one batch."""

from __future__ import annotations

import copy
import importlib.metadata
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel

from soka_serve.builtin import base_directory
from soka_serve.kron import stack_terms
from soka_serve.peft import build_soka_model, get_factors
from tests.conftest import ROOT
from tests.support.serve_adapters import (
    ALPHA,
    BETA,
    LOKR,
    LORA,
    PROMPTS,
    TARGET_OPTIONS,
    AdapterServer,
    summed,
    write_peft,
    write_soka,
)
from tests.support.serving import ONE_PROCESS, base_model, greedy_logprobs, random_factors, serve, with_delta
from tests.support.tolerances import rms

pytestmark = pytest.mark.slow

LONG_PROMPT = [1, *range(30, 180)]
KINDS = ["base", "alpha", "lokr", "beta", "lora"]  # the LoRA adapter in the last slot


def test_the_entry_point_is_installed() -> None:
    """vLLM finds the plugin by it; a checkout that was installed before it was there wants `make venv` again."""
    assert importlib.metadata.entry_points(group="vllm.general_plugins", name="soka")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterServer]:
    folder = tmp_path_factory.mktemp("serve")
    references = {
        "base": base_model(),
        "alpha": write_soka(folder / "alpha", random_factors(ALPHA, 1, seed=1, scale=0.02)),
        "beta": write_soka(folder / "beta", random_factors(BETA, 4, seed=2, scale=0.04)),
        "lora": write_peft(folder / "lora", LORA, seed=3),
        "lokr": write_peft(folder / "lokr", LOKR, seed=3),
    }
    options = [*TARGET_OPTIONS, "--max-loras", "4", "--max-cpu-loras", "6", "--max-lora-rank", "8"]
    options += ["--lora-modules", *(f"{name}={folder / name}" for name in KINDS[1:])]
    with serve(folder, options) as server:
        yield AdapterServer(server, references, folder)


def test_alone(served: AdapterServer) -> None:
    for name in KINDS:
        for prompt in PROMPTS:
            served.check_alone(name, prompt)


def test_all_in_one_batch(served: AdapterServer) -> None:
    served.check_at_once(KINDS)


def test_independent_check(served: AdapterServer) -> None:
    script = Path(os.environ.get("SOKA_ACCEPT", ROOT.parent / "shared" / "accept")) / "check_server.py"
    if not script.exists():
        pytest.skip(f"no {script}")
    command = [sys.executable, str(script), "--url", served.server.url, "--base", str(base_directory())]
    command += ["--base-name", "base", "--tokens", "12"]
    for name in ("alpha", "beta"):
        command += ["--adapter", f"{name}={served.folder / name}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_more_adapters_than_slots(served: AdapterServer) -> None:
    """Six adapters on four slots: slots change hands between kinds; one of them is a checkpoint of a training."""
    gamma = random_factors(ALPHA, 2, seed=4, scale=0.02)
    served.references["gamma"] = write_soka(served.folder / "gamma", gamma)
    served.references["training"] = write_checkpoint(served.folder / "training")
    names = ["gamma", "training"]
    for name in names:
        status, reply = served.server.load(name, served.folder / name)
        assert status == 200, reply
    served.check_at_once(["gamma", "lora", "base", "training", "lokr", "beta", "alpha"])
    for name in ("alpha", "lora", "training", "gamma", "beta", "lokr", "lora", "base"):
        served.check_alone(name, PROMPTS[0])
    for name in names:
        status, reply = served.server.unload(name)
        assert status == 200, reply
        status, reply = served.server.post("/v1/completions", {"model": name, "prompt": [1, 2], "max_tokens": 1})
        assert status == 404, reply
    served.check_at_once(["alpha", "base", "lora"])


def test_a_model_that_does_not_exist(served: AdapterServer) -> None:
    """The answer says which there are, and which was probably meant."""
    said = "The model `alhpa` does not exist. Did you mean `alpha`? The base is base; adapters: alpha, beta, lokr, lora"
    message = {"role": "user", "content": "x"}
    for path, asked in (("completions", {"prompt": [1, 2]}), ("chat/completions", {"messages": [message]})):
        status, reply = served.server.post(f"/v1/{path}", {"model": "alhpa", "max_tokens": 1, **asked})
        assert status == 404, reply
        assert reply["error"]["message"] == said
        assert reply["error"]["type"] == "NotFoundError"


def test_an_idle_server_takes_no_processor(served: AdapterServer) -> None:
    """vLLM's worker looks for work all the time while it has some, and until a second later."""
    served.server.ask("base", [1, 2], 1)
    time.sleep(2)
    processes = [psutil.Process(served.server.pid), *psutil.Process(served.server.pid).children(recursive=True)]
    assert len(processes) >= 3  # API, engine, worker
    before = sum(sum(process.cpu_times()[:2]) for process in processes)
    time.sleep(4)
    taken = sum(sum(process.cpu_times()[:2]) for process in processes) - before
    assert taken < 0.4, f"{taken:.2f} s of processor time in 4 s"


def write_checkpoint(folder: Path) -> Any:
    """An adapter as it is saved during training, with the initial factors; returns its reference."""
    initial = random_factors(BETA, 2, seed=5, scale=0.05)
    model = build_soka_model(base_model(), initial, initial=True, base_model=str(base_directory()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "soka_sigma" in name and "initial" not in name:
                parameter.mul_(-1)
    theta, theta0 = get_factors(model)
    model.save_pretrained(folder)
    return with_delta({name: stack_terms(theta[name], theta0[name], signs=(1, -1)) for name in theta})


def test_the_log_says_what_was_loaded(served: AdapterServer) -> None:
    log = served.server.log.read_text()
    assert f"SOKA adapter 'alpha' from {served.folder / 'alpha'}: 28 modules, ranks 1 to 2, " in log


def test_what_was_compiled(served: AdapterServer) -> None:
    """Nothing: vLLM compiles no model that takes adapters on CPUs, asked for or not (test_plugin_op.py compiles)."""
    log = served.server.log.read_text()
    assert "enforce_eager=False" in log
    assert "'mode': <CompilationMode.NONE: 0>" in log


def test_bfloat16_in_eager_mode(tmp_path: Path) -> None:
    """Not much further from float32 than transformers with merged weights is, itself in bfloat16."""
    references = {
        "base": base_model(),
        "alpha": write_soka(tmp_path / "alpha", random_factors(ALPHA, 1, seed=1, scale=0.01)),
        "lora": write_peft(tmp_path / "lora", LORA, seed=3),
        "beta": write_soka(tmp_path / "beta", random_factors(BETA, 4, seed=2, scale=0.02)),
    }
    references["alpha+0.3*lora"] = summed(references, (1, "alpha"), (0.3, "lora"))
    options = [*TARGET_OPTIONS, "--enforce-eager", "--max-loras", "3"]
    options += ["--lora-modules", *(f"{n}={tmp_path / n}" for n in ("alpha", "lora", "beta"))]
    jobs = [(name, prompt) for prompt in PROMPTS for name in references]
    with serve(tmp_path, options, "bfloat16", ONE_PROCESS) as server:
        alone = [server.ask(*job) for job in jobs]
        answers = list(zip(jobs + jobs, alone + server.ask_at_once(jobs), strict=True))
        of_prompts = {name: server.ask_prompt(name, LONG_PROMPT) for name in references}
        assert "enforce_eager=True" in server.log.read_text()

    def logprobs(model: Any, name: str) -> torch.Tensor:
        """A model's log-probabilities of all that `name` answered."""
        chosen = [(prompt, tokens) for (asked, prompt), (tokens, _) in answers if asked == name]
        chosen.append((LONG_PROMPT[:1], LONG_PROMPT[1:]))
        steps = [
            greedy_logprobs(model, prompt, tokens).gather(1, torch.tensor(tokens)[:, None]) for prompt, tokens in chosen
        ]
        return torch.cat(steps).flatten()

    for name, model in references.items():
        of_answers = [x for (asked, _), (_, got) in answers if asked == name for x in got]
        served = torch.tensor(of_answers + of_prompts[name]).double()
        want, plain = logprobs(model, name), logprobs(references["base"], name)
        merged = copy.deepcopy(model)
        if isinstance(merged, PeftModel):
            merged = merged.merge_and_unload()
        error, allowed, effect = rms(served - want), rms(logprobs(merged.bfloat16(), name) - want), rms(plain - want)
        assert error < 2 * allowed, (name, error, allowed)
        assert name == "base" or effect > 10 * error, (name, error, effect)
