"""Two replicas of vLLM on Ray Serve: right answers wherever a request goes. Their deaths: test_replica_front.py."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.conftest import NEEDS_VLLM
from tests.support.replicas import Application, replicas
from tests.support.serve_adapters import clear_jobs, write_many

pytest.importorskip("ray", reason="Ray is not installed (make venv installs it)")
# In `make test` the parts are tested apart: test_replica_front.py has the application, test_serve_many.py the servers.
pytestmark = [NEEDS_VLLM, pytest.mark.slow, pytest.mark.slow_matrix]

TOKENS = 8
ADAPTERS = 4
Job = tuple[str, list[int], list[int]]


@dataclass
class World:
    """The application, and what it must answer."""

    application: Application
    jobs: list[Job]

    def ask(self, job: Job) -> list[int]:
        """The tokens that the application answers."""
        name, prompt, answer = job
        status, reply = self.application.post("/v1/completions", body(name, prompt, len(answer)))
        assert status == 200, reply
        tokens: list[int] = reply["choices"][0]["token_ids"]
        return tokens


def body(name: str, prompt: list[int], tokens: int = TOKENS, **more: Any) -> dict[str, Any]:
    asked = {"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    return {**asked, "ignore_eos": True, "return_token_ids": True, **more}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("replicas")
    references = write_many(folder / "builds", ADAPTERS)
    references["tiny"] = references.pop("base")
    jobs = clear_jobs(references, list(references), [12, 20], each=3, tokens=TOKENS, seed=1)
    arguments = {
        "builds": str(folder / "builds"),
        "base": "tiny",
        "replicas": 2,
        "vllm": ["--max-loras", "2", "--max-model-len", "256", "--dtype", "float32"],
    }
    with replicas(folder, arguments) as application:
        yield World(application, jobs)


def test_answers_go_where_their_adapter_is(world: World) -> None:
    application = world.application
    assert len(application.engines()) == 2
    for _ in range(5):
        for job in world.jobs:
            assert world.ask(job) == job[2]
    # Four adapters on twice two slots: one fill each, and a few from before a replica's adapters were known. Routed by
    # load alone every second request would miss.
    assert ADAPTERS <= application.slot_fills() <= 3 * ADAPTERS


def test_streams_and_refusals_are_those_of_vllm(world: World) -> None:
    application = world.application
    name, prompt, answer = world.jobs[0]
    request = urllib.request.Request(
        application.url + "/v1/completions",
        json.dumps(body(name, prompt, stream=True)).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        events = [line[6:] for line in reply.read().decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    pieces = [json.loads(event)["choices"][0]["token_ids"] for event in events[:-1]]
    assert len(pieces) > 2
    assert [token for piece in pieces for token in piece or ()] == answer
    direct = next(iter(application.engines().values()))
    for asked in (body("a9", [1]), body(name, []), body(name, [1] * 500), {"model": name, "prompt": 1.5}):
        status, reply = application.post("/v1/completions", asked)
        assert (status, reply) == direct.post("/v1/completions", asked)
        assert 400 <= status < 500
    status, reply = application.load("x", "/nowhere")
    assert status == 400
    assert "every replica loads adapters of the application's `builds` folder" in reply["error"]["message"]
