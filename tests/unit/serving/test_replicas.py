"""Arguments of the Ray Serve application, and the files of `deploy/` that give them. No cluster is started."""

from __future__ import annotations

import asyncio
import importlib
import pickle
import warnings
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
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
    import httpx
    from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

    from soka_serve.serving import replica_front
    from soka_serve.serving.replica import (
        AnswerHead,
        Asked,
        BrokenOffError,
        Replica,
        ReplicaLostError,
        ReplicaSettings,
        local_client,
        replica_url,
    )
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


def ask(replicas: Any, method: str, path: str, retry_s: float = 0, body: bytes = b"") -> Response:
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": [(b"host", b"here")]}

    async def nothing_more() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return asyncio.run(Front(replicas, by_adapter=True, retry_s=retry_s)(Request(scope, nothing_more)))


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


class Forwarding:
    """A handle whose replicas answer one after the other: with an error, or with what a replica yields."""

    def __init__(self, *answers: Exception | list[AnswerHead | bytes]) -> None:
        self.answers, self.sent = answers, 0
        self.forward = self

    def options(self, **_: object) -> Forwarding:
        return self

    async def remote(self, asked: Asked) -> AsyncIterator[AnswerHead | bytes]:
        answer = self.answers[self.sent % len(self.answers)]
        self.sent += 1
        if isinstance(answer, Exception):
            raise answer
        for piece in answer:
            yield piece


@pytest.fixture
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_front, "_PAUSE_S", 0.0)
    monkeypatch.setattr(replica_front, "_APART_S", 0.0)


@pytest.mark.usefixtures("_no_pause")
def test_a_request_that_replicas_die_of_is_not_sent_to_all_of_them() -> None:
    def lost(name: str) -> ReplicaLostError:
        error = pickle.loads(pickle.dumps(ReplicaLostError("the engine has died", name)))
        assert isinstance(error, ReplicaLostError)
        return error

    deadly = Forwarding(*map(lost, "aabbbcdefghij"))
    answer = ask(deadly, "GET", "/v1/x", retry_s=30)
    assert (answer.status_code, deadly.sent) == (500, 6)
    assert b"3 replicas have died that had this request: the engine has died" in answer.body
    actors = Forwarding(*(RayActorError(actor_id=name, error_msg="gone") for name in "abcd"))
    assert ask(actors, "GET", "/v1/x", retry_s=30).status_code == 500
    head = AnswerHead(200, ())
    unlucky = Forwarding(lost("a"), *[lost("")] * 9, lost("b"), [head, b"right"])  # those were dead before
    assert ask(unlucky, "GET", "/v1/x", retry_s=30).body == b"right"


@pytest.mark.usefixtures("_no_pause")
def test_an_answer_that_breaks_off_is_asked_for_once_more() -> None:
    """Of a vLLM that lives, whatever the reason: no replica is lost."""
    traceback = "Traceback (most recent call last):\n  File"
    cause = BrokenOffError("ReadError: reset")
    broken: Any = RayTaskError("forward", traceback, cause, ip="10.0.0.1").as_instanceof_cause()
    again = Forwarding(broken, [AnswerHead(200, ()), b"right"])
    assert ask(again, "GET", "/v1/x", retry_s=30).body == b"right"
    twice = Forwarding(broken)
    answer = ask(twice, "GET", "/v1/x", retry_s=30)
    assert (answer.status_code, twice.sent) == (502, 2)
    assert b"ReadError: reset" in answer.body
    assert b"died" not in answer.body
    assert b"10.0.0.1" not in answer.body

    async def stream() -> list[bytes]:
        async def cut() -> AsyncIterator[bytes]:
            yield b"two"
            raise broken

        return [piece async for piece in replica_front._rest(b"one", cut())]

    *sent, last = asyncio.run(stream())
    assert sent == [b"one", b"two"]
    assert b'"code": 502' in last
    assert b"ReadError: reset" in last


@pytest.mark.usefixtures("_no_pause")
def test_an_actor_that_is_out_of_reach_has_not_died() -> None:
    away = [ActorUnavailableError("no route", bytes([number] * 16)) for number in range(5)]
    back = Forwarding(*away, [AnswerHead(200, ()), b"right"])
    assert ask(back, "GET", "/v1/x", retry_s=30).body == b"right"


@pytest.mark.parametrize("body", [b"[" * 200_000, b'{"model": ' * 200_000, b"{", b"[1]", b'{"model": 3}', b"\xff"])
def test_a_body_that_names_no_model_is_for_vllm_to_refuse(body: bytes) -> None:
    refusing = Forwarding([AnswerHead(400, ()), b"no JSON"])
    answer = ask(refusing, "POST", "/v1/completions", body=body)
    assert (answer.status_code, answer.body) == (400, b"no JSON")


class Alone(Replica):
    """A replica whose vLLM is a function of requests."""

    def __init__(self, answer: Callable[[httpx.Request], httpx.Response]) -> None:
        transport = httpx.MockTransport(answer)
        self._client = httpx.AsyncClient(base_url="http://127.0.0.1:1", transport=transport)
        self._server: Any = SimpleNamespace(is_running=True, stop=lambda: None)
        self._keys = {}

    @property
    def _name(self) -> str:
        return "this one"


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def gather(replica: Replica, asked: Asked) -> list[AnswerHead | bytes]:
    return [piece async for piece in replica.forward(asked)]


@pytest.mark.parametrize("engine_lives", [True, False])
@pytest.mark.parametrize(
    "events",
    [
        b'data: {"error": {"message": "EngineCore encountered an issue", "code": 500}}\n\ndata: [DONE]\n\n',
        b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"EngineCore"}}\n\n',
    ],
)
def test_a_stream_that_ends_with_an_error_is_lost_where_the_engine_has_died(events: bytes, engine_lives: bool) -> None:

    def vllm(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/health":
            return httpx.Response(200 if engine_lives else 503)
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=pieces(events))

    asked = Asked("POST", "/v1/completions", (), b"{}")
    if engine_lives:
        assert asyncio.run(gather(Alone(vllm), asked))[1:] == [events]
    else:
        with pytest.raises(ReplicaLostError) as caught:
            asyncio.run(gather(Alone(vllm), asked))
        assert caught.value.replica == "this one"


def test_headers_and_paths_beyond_ascii_are_passed_on() -> None:
    seen: list[httpx.Request] = []

    def vllm(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(404, headers=[(b"x-said", "größer".encode("latin-1"))], content=pieces(b""))

    asked = Asked("GET", "/v1/models/\u00e9?q=%C3%A9", (("x-user", "J\u00f6rg"), ("host", "elsewhere")), b"")
    head, *_ = asyncio.run(gather(Alone(vllm), asked))
    assert isinstance(head, AnswerHead)
    assert head.status == 404
    assert seen[0].url.raw_path == b"/v1/models/%C3%A9?q=%C3%A9"
    assert (b"x-user", "J\u00f6rg".encode("latin-1")) in seen[0].headers.raw
    assert seen[0].headers["host"] == "127.0.0.1:1"


@pytest.mark.parametrize("kind", [b"application/json", b"text/event-stream"])
@pytest.mark.parametrize("value", ["größer €".encode(), "größer".encode("latin-1")])
def test_headers_of_an_answer_are_passed_on_byte_by_byte(value: bytes, kind: bytes) -> None:
    sent = [(b"content-type", kind), (b"x-request-id", value), (b"set-cookie", b"a=1"), (b"set-cookie", b"b=2")]

    def vllm(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers=sent, content=pieces(b"{}"))

    found = asyncio.run(gather(Alone(vllm), Asked("GET", "/", (), b"")))
    answer = ask(Forwarding(found), "GET", "/v1/x")  # type: ignore[arg-type]
    assert [header for header in answer.raw_headers if header[0] != b"content-length"] == sent


def test_a_replica_whose_vllm_is_down_has_no_names() -> None:
    def down(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(ReplicaLostError, match="does not answer"):
        asyncio.run(Alone(down).base_names())
    with pytest.raises(ReplicaLostError) as caught:
        asyncio.run(gather(Alone(down), Asked("GET", "/", (), b"")))
    assert caught.value.replica == ""


def test_a_replica_asks_its_vllm_through_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)

    async def ask_it() -> int:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n")
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            client = local_client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            return (await client.get("/health")).status_code

    assert asyncio.run(ask_it()) == 204


@pytest.mark.parametrize("error", [httpx.ConnectError("full"), httpx.ReadError("reset")])
@pytest.mark.parametrize("late", [False, True])
def test_a_transport_error_of_a_vllm_that_lives_loses_no_replica(error: httpx.TransportError, late: bool) -> None:
    async def cut() -> AsyncIterator[bytes]:
        yield b"one"
        raise error

    def vllm(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/health":
            return httpx.Response(200)
        if late:
            return httpx.Response(200, content=cut())
        raise error

    with pytest.raises(BrokenOffError, match=f"{type(error).__name__}: {error}"):
        asyncio.run(gather(Alone(vllm), Asked("GET", "/", (), b"")))
    if not late:
        with pytest.raises(BrokenOffError, match="/v1/models"):
            asyncio.run(Alone(vllm).base_names())


def test_a_vllm_that_lives_and_names_no_models_loses_no_replica() -> None:
    def vllm(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200 if request.url.path == "/health" else 401, json={"error": "Unauthorized"})

    with pytest.raises(BrokenOffError, match="/v1/models: status 401"):
        asyncio.run(Alone(vllm).base_names())


def test_a_path_reaches_its_replica_and_no_other_host() -> None:
    for path in ("//elsewhere.example/v1/models", "/v1/models?a=%2F", "/a%2Fb"):
        url = replica_url("http://127.0.0.1:8001", path)
        assert (url.host, url.port) == ("127.0.0.1", 8001)
        assert url.raw_path == path.encode()
