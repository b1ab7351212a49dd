"""A real vLLM server for the tests, and transformers with the dense delta to hold its answers against."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from soka_serve.builtin import base_directory
from soka_serve.kron import Factors
from soka_serve.serving.log import root_causes
from tests.support import preloaded

START_S = 240

# vLLM then computes in the engine's own process, as it does for one GPU, and not in a worker process of its own, as it
# does on CPUs otherwise. A process less to start, which takes as long as importing vLLM does.
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


class Server:
    """A running server; `log` is what it wrote, `pid` its first process."""

    def __init__(self, url: str, log: Path) -> None:
        self.url = url
        self.log = log
        self.pid = 0

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        """Status and answer of a request."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return reply.status, _parsed(reply.read())
        except urllib.error.HTTPError as error:
            return error.code, _parsed(error.read())

    def load(self, name: str, path: str | Path, **more: Any) -> tuple[int, Any]:
        """Status and answer of the request to load an adapter."""
        return self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **more})

    def unload(self, name: str) -> tuple[int, Any]:
        """Status and answer of the request to unload an adapter."""
        return self.post("/v1/unload_lora_adapter", {"lora_name": name})

    def get(self, path: str) -> Any:
        """The answer to a request without a body."""
        with urllib.request.urlopen(self.url + path, timeout=120) as reply:
            return _parsed(reply.read())

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        samples = [line for line in self.get("/metrics").splitlines() if line.startswith((name + "{", name + " "))]
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(float(line.rpartition(" ")[2]) for line in samples if all(w in line for w in wanted))

    def ask(self, model: str, prompt: Sequence[int], tokens: int = 12) -> tuple[list[int], list[float]]:
        """Greedy tokens and their log-probabilities."""
        body = {"model": model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "logprobs": 1}
        status, reply = self.post("/v1/completions", {**body, "return_token_ids": True, "ignore_eos": True})
        assert status == 200, (status, reply)
        choice = reply["choices"][0]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]

    def ask_prompt(self, model: str, prompt: Sequence[int]) -> list[float]:
        """The log-probability of each token of a prompt but the first."""
        body = {"model": model, "prompt": list(prompt), "max_tokens": 1, "prompt_logprobs": 1}
        status, reply = self.post("/v1/completions", {**body, "return_tokens_as_token_ids": True})
        assert status == 200, (status, reply)
        steps = reply["choices"][0]["prompt_logprobs"][1:]
        return [step[str(token)]["logprob"] for step, token in zip(steps, prompt[1:], strict=True)]

    def ask_at_once(self, jobs: Sequence[tuple[str, Sequence[int]]]) -> list[tuple[list[int], list[float]]]:
        """The answers to (model, prompt) pairs that are sent together."""
        with ThreadPoolExecutor(len(jobs)) as pool:
            return list(pool.map(lambda job: self.ask(*job), jobs))


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serve(
    folder: Path, options: Sequence[str], dtype: str = "float32", more: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Start a server of the embedded base under the name "base", and end it and its children afterwards.

    Args:
        more: environment variables.
    """
    port = free_port()
    command = ["vllm.entrypoints.openai.api_server", "--model", str(base_directory())]
    command += ["--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port), "--dtype", dtype]
    command += ["--max-model-len", "256", "--max-num-seqs", "16", "--enable-lora", *options]
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", **(more or {})}
    with running(command, Server(f"http://127.0.0.1:{port}", folder / "server.log"), environment) as server:
        yield server


@contextmanager
def running(command: Sequence[str], server: Server, environment: Mapping[str, str]) -> Iterator[Server]:
    """Start a server, wait until it answers, and end it and its children afterwards.

    Args:
        command: what follows `python -m`.
        server: where it will be, and its log, whose folder it runs in.
        environment: added to that of the tests.
    """
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",  # clients pool connections; one closed meanwhile would fail a request
        "VLLM_LOGGING_LEVEL": "INFO",  # TRL, imported by another test, sets it to ERROR for the whole process
        **environment,
    }
    with server.log.open("w") as log, Path(os.devnull).open() as nothing:
        process = preloaded.start("vllm", command, cwd=server.log.parent, files=(nothing, log, log), env=variables)
        server.pid = process.pid
        try:
            _wait(server, process)
            yield server
        except BaseException as error:
            for cause in root_causes(server.log.read_text(errors="replace")):
                error.add_note(f"vLLM's log has: {cause}")
            raise
        finally:
            with suppress(ProcessLookupError):  # ended already, with all of its group
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait(30)


def _wait(server: Server, process: preloaded.Program) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(server.url + "/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"the server did not start:\n{server.log.read_text()[-6000:]}")


def random_factors(
    shapes: Mapping[str, tuple[int, int, int, int]], rank: int, seed: int, scale: float
) -> dict[str, Factors]:
    """Random terms whose delta has entries of about `scale`, by module."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for offset, (name, (m, n, p, q)) in enumerate(shapes.items()):
        terms = rank + offset % 2  # ranks differ within an adapter too
        left = torch.randn(terms, m, n, generator=generator)
        right = torch.randn(terms, p, q, generator=generator)
        sigma = scale * (torch.rand(terms, generator=generator) + 0.5) / terms**0.5
        made[name] = Factors(left, right, sigma)
    return made


def base_model() -> Any:
    """The embedded base in transformers, float32."""
    return AutoModelForCausalLM.from_pretrained(base_directory(), dtype=torch.float32).eval()


def with_delta(factors: Mapping[str, Factors], base: Any = None) -> Any:
    """The base with each module's dense delta, made with torch.kron in float64, added to its weight.

    Args:
        base: a model to change, instead of a new one.
    """
    model = base_model() if base is None else base
    with torch.no_grad():
        for name, f in factors.items():
            terms = zip(f.sigma.double(), f.left.double(), f.right.double(), strict=True)
            weight = model.get_submodule(name).weight
            weight.copy_((weight.double() + sum(s * torch.kron(left, right) for s, left, right in terms)).float())
    return model


def greedy_logprobs(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """(tokens, vocabulary) float64: log-probabilities at each position of the answer."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0].double()
    return torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
