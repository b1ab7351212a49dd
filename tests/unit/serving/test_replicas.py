"""Arguments of the Ray Serve application, and the files of `deploy/` that give them. No cluster is started."""

from __future__ import annotations

import asyncio
import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from soka_serve.errors import SokaError

pytest.importorskip("ray", reason="Ray is not installed (make venv installs it)")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Ray, about its own models
    from soka_serve.serving.replica import ReplicaSettings, replica_url
    from soka_serve.serving.replica_front import Front
    from soka_serve.serving.replicas import ReplicaOptions

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"


def test_texts_of_the_command_line_are_split() -> None:
    options = ReplicaOptions.model_validate({"targets": "a=build/a 'b c'", "vllm": "--max-loras 4", "replicas": "2"})
    assert options.targets == ["a=build/a", "b c"]
    assert options.vllm == ["--max-loras", "4"]
    assert options.replicas == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to serve: give targets, or a folder of builds"),
        ({"targets": ["a"], "replica": 2}, "replica\n  Extra inputs are not permitted"),
        ({"targets": ["a"], "replicas": 3, "max_replicas": 2}, "max_replicas = 2 is less than replicas = 3"),
        ({"targets": ["a"], "remove_after_s": 9}, "remove_after_s is for scaling by load: give max_replicas as well"),
        ({"targets": ["a"], "vllm": ["--port", "1"]}, "vllm: --port is a replica's own"),
    ],
)
def test_arguments_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ReplicaOptions.model_validate(arguments)
    assert message in str(caught.value)


def test_a_replica_tells_of_as_many_adapters_as_it_has_slots(tmp_path: Path) -> None:
    def slots(vllm: tuple[str, ...] = (), builds: str | None = None, targets: tuple[str, ...] = ()) -> int:
        return ReplicaSettings(targets, None, builds, vllm, 1.0).slots()

    assert slots(("--max-loras", "3")) == slots(("--max_loras=3",)) == 3
    assert slots(targets=tuple("abcdefghij")) == 10
    for name in range(12):
        (tmp_path / f"{name}").mkdir()
        (tmp_path / f"{name}" / "adapter_config.json").write_text("{}")
    assert slots(builds=str(tmp_path)) == 12
    assert slots(builds="https://host.example/builds") == 8  # which is not listed
    with pytest.raises(SokaError, match="Protocol not known: s4"):
        slots(builds="s4://bucket/builds")
    with pytest.raises(SokaError, match="no such directory"):
        slots(builds=str(tmp_path / "none"))


def test_the_rayservice_names_the_application() -> None:
    config = yaml.safe_load(yaml.safe_load((DEPLOY / "rayservice.yaml").read_text())["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    module, name = application["import_path"].split(":")
    assert callable(getattr(importlib.import_module(module), name))
    ReplicaOptions.model_validate(application["args"])


@pytest.mark.parametrize(
    "path",
    [
        "/v1/load_lora_adapter",
        "/v1/x/../load_lora_adapter",
        "/./v1/./load_lora_adapter",
        "/v1/unload_lora_adapter/",
    ],
)
def test_what_would_reach_one_replica_is_refused_however_it_is_written(path: str) -> None:
    answer = ask(None, "POST", path)
    assert answer.status_code == 400
    assert b"is not served here" in answer.body


def ask(replicas: Any, method: str, path: str) -> Response:
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": [(b"host", b"here")]}
    return asyncio.run(Front(replicas, by_adapter=True, retry_s=0)(Request(scope)))


class Replicas:
    """A handle of replicas that answer a broadcast so."""

    def __init__(self, *answers: object, late: bool = False) -> None:
        self.answers, self.late = answers, late

    def broadcast(self, method: str) -> Replicas:
        assert method == "metrics"
        return self

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[object]:
        assert return_exceptions
        if self.late:
            raise TimeoutError
        return list(self.answers)


@pytest.mark.parametrize("path", ["/metrics", "/metrics/x", "/v1/../metrics"])
def test_metrics_come_without_a_replica_that_has_none(path: str) -> None:
    answer = ask(Replicas(("x", "# TYPE a gauge\na 1.0\n"), RuntimeError("lost")), "GET", path)
    assert answer.status_code == 200
    assert b'\na{replica="x"} 1.0\n' in answer.body
    for none in (Replicas(RuntimeError("lost")), Replicas(late=True)):
        assert ask(none, "GET", path).status_code == 503


def test_a_path_reaches_its_replica_and_no_other_host() -> None:
    for path in ("//elsewhere.example/v1/models", "/v1/models?a=%2F", "/a%2Fb"):
        url = replica_url("http://127.0.0.1:8001", path)
        assert (url.host, url.port) == ("127.0.0.1", 8001)
        assert url.raw_path == path.encode()
