"""One replica of a Ray Serve application: a vLLM server of its own, and the requests that are passed on to it."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import httpx
from ray import serve

from soka_serve.errors import ServeError, SokaError
from soka_serve.serving.command import Launch, ServeOptions, list_builds, parse_builds, parse_options
from soka_serve.serving.probe import probe
from soka_serve.serving.process import Server
from soka_serve.serving.serve import log_file, plan_launch
from soka_serve.serving.targets import Target

_HEALTH_S = 60.0
_METRICS_S = 5.0
_ERROR_EVENTS = (b'data: {"error"', b"event: error")  # OpenAI's, Anthropic's
_IN_A_PATH = "%/?#[]@!$&'()*+,;=:~" + '\\^`{|}"<> '  # what may be wrong there is for `httpx.URL` to say
# Of one connection, or made anew on the way to the client.
_HOP_HEADERS = frozenset(
    ("connection", "content-length", "date", "host", "keep-alive", "server", "transfer-encoding", "upgrade")
)


class ReplicaLostError(Exception):
    """The replica's vLLM has died: the request may be sent to another.

    Args:
        message: what was seen of it.
        replica: the replica's name, where it died with the request; empty where it was dead before.
    """

    def __init__(self, message: str, replica: str = "") -> None:
        super().__init__(message, replica)  # both, so that it can be pickled
        self.replica = replica

    def __str__(self) -> str:
        return str(self.args[0])


class BrokenOffError(Exception):
    """No whole answer came of a vLLM that lives: the message has the reason."""


@dataclass(frozen=True)
class Asked:
    """A request as the client sent it, and the adapter that it asks for (empty: the base, or none)."""

    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    adapter: str = ""


@dataclass(frozen=True)
class AnswerHead:
    """Status and headers of an answer; its body follows in pieces."""

    status: int
    headers: tuple[tuple[str, str], ...]

    @property
    def is_stream(self) -> bool:
        """Whether the body is a stream of events."""
        return any(name == "content-type" and value.startswith("text/event-stream") for name, value in self.headers)


@dataclass(frozen=True)
class ReplicaSettings:
    """What a replica serves, and how: see `soka_serve.serving.replicas.ReplicaOptions`."""

    targets: tuple[str, ...]
    base: str | None
    builds: str | None
    vllm: tuple[str, ...]
    start_s: float

    def slots(self) -> int:
        """How many adapters vLLM holds in slots: --max-loras, else one for each.

        Raises:
            SokaError: no such folder of builds, a URL that nothing here can open, or something before the first option
                in `vllm`.
        """
        given = parse_options(self.vllm).get("--max-loras")
        if given and given[0].isdigit():
            return max(int(given[0]), 1)
        builds = parse_builds(self.builds) if self.builds is not None else None
        return max(len(self.targets), len(list_builds(builds)) if isinstance(builds, Path) else 1, 8)


class Replica:
    """A vLLM server on this machine; Ray Serve makes one for each replica.

    Args:
        settings: what it serves.

    Raises:
        ServeError: what `soka-serve serve` refuses, with its hint: Ray Serve shows the message alone.
    """

    def __init__(self, settings: ReplicaSettings) -> None:
        logging.getLogger("soka_serve").setLevel(logging.INFO)
        try:
            self._start(settings)
        except SokaError as error:
            raise ServeError(error.message + (f"\nhint: {error.hint}" if error.hint else "")) from None

    def _start(self, settings: ReplicaSettings) -> None:
        targets, launch = self._plan(settings)
        self._server = Server(launch, log_file(launch.port))
        try:
            self._server.wait_healthy(settings.start_s)
            if targets and targets[0].kind == "adapter":
                with self._server.explaining():
                    probe(launch, targets)
        except BaseException:
            self._server.stop()
            raise
        self._client = local_client(launch.url)
        self._keys = {"authorization": f"Bearer {launch.api_key}"} if launch.api_key else {}

    @staticmethod
    def _plan(settings: ReplicaSettings) -> tuple[list[Target], Launch]:
        builds = parse_builds(settings.builds) if settings.builds is not None else None
        options = ServeOptions(host="127.0.0.1", port=free_port(), builds=builds, vllm=settings.vllm)
        return plan_launch(settings.targets, options, base=settings.base)

    async def hold(self, adapter: str) -> str:
        """Tell Ray Serve that this replica holds an adapter; see `soka_serve.serving.replicas`."""
        raise NotImplementedError

    async def base_names(self) -> list[str]:
        """The names of the base (or of the merged model) in the API.

        Raises:
            ReplicaLostError: vLLM has died.
            BrokenOffError: it does not answer with them.
        """
        try:
            answer = await self._client.get("/v1/models", headers=self._keys)
        except httpx.TransportError as error:
            raise await self._failure(f"vLLM does not answer to /v1/models: {_text(error)}") from error
        try:
            return [card["id"] for card in answer.json()["data"] if not card.get("parent")]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            said = f"vLLM names no models in /v1/models: status {answer.status_code}"
            raise await self._failure(said) from error

    async def metrics(self) -> tuple[str, str]:
        """This replica's name in Ray Serve, and the page of its vLLM's metrics.

        Raises:
            ServeError: vLLM has none for it, or none in time.
        """
        try:
            answer = await self._client.get("/metrics", headers=self._keys, timeout=_METRICS_S)
        except httpx.TransportError as error:
            raise ServeError(f"vLLM does not answer to /metrics: {type(error).__name__}") from None
        if answer.status_code != 200:
            raise ServeError(f"vLLM answers {answer.status_code} to /metrics")
        return self._name, answer.text

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica where this fails.

        Raises:
            ServeError: vLLM has ended, or its engine has died.
        """
        if not await self._is_alive():
            raise ServeError("vLLM has ended", hint=f"Its log is {self._server.log}")

    async def forward(self, asked: Asked) -> AsyncIterator[AnswerHead | bytes]:
        """Pass a request on to vLLM.

        Yields:
            The answer's head, then its body in pieces as they come.

        Raises:
            ReplicaLostError: vLLM or its engine died before the answer was whole.
            BrokenOffError: the answer did not become whole, and vLLM lives.
        """
        request = self._client.build_request(
            asked.method,
            replica_url(str(self._client.base_url), asked.path),
            # As they came: names and values may be of any bytes above ASCII, too.
            headers=[(name.encode("latin-1"), value.encode("latin-1")) for name, value in _kept(asked.headers)],
            content=asked.body,
        )
        try:
            answer = await self._client.send(request, stream=True)
        except httpx.ConnectError as error:
            raise await self._failure(_text(error)) from error
        except httpx.TransportError as error:
            raise await self._failure(_text(error), self._name) from error
        try:
            if answer.status_code >= 500 and not await self._is_alive():
                raise ReplicaLostError(f"status {answer.status_code}, and the engine has died", self._name)
            if asked.adapter and answer.status_code < 400:  # of those only: a name that does not exist holds no slot
                await self.hold(asked.adapter)
            # Byte by byte, as Starlette writes them.
            headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in answer.headers.raw]
            head = AnswerHead(answer.status_code, tuple(_kept(headers)))
            yield head
            async for piece in answer.aiter_raw():
                # vLLM ends streams with an error as their last event when its engine dies, and with status 200.
                ends = head.is_stream and any(event in piece for event in _ERROR_EVENTS)
                if ends and not await self._is_alive():
                    raise ReplicaLostError("a stream ended with an error, and the engine has died", self._name)
                yield piece
        except httpx.TransportError as error:
            raise await self._failure(_text(error), self._name) from error
        finally:
            await answer.aclose()

    @property
    def _name(self) -> str:
        """This replica's name in Ray Serve."""
        return str(serve.get_replica_context().replica_id.unique_id)

    async def _failure(self, said: str, replica: str = "") -> Exception:
        """What to raise after an answer that did not come, or not whole; `replica` as of ReplicaLostError."""
        return BrokenOffError(said) if await self._is_alive() else ReplicaLostError(said, replica)

    async def _is_alive(self) -> bool:
        if not self._server.is_running:
            return False
        try:
            return (await self._client.get("/health", timeout=_HEALTH_S)).status_code == 200
        except httpx.TimeoutException:
            return True  # it has much to do
        except httpx.TransportError:
            return False

    def __del__(self) -> None:
        if hasattr(self, "_server"):
            self._server.stop()


def local_client(url: str) -> httpx.AsyncClient:
    """A client of the server on this machine at `url`, which it asks through no proxy.

    It has no limits: Ray Serve has counted the requests, and how long an answer takes is for the client to say.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=None, limits=limits, verify=False, trust_env=False)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _kept(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name.lower(), value) for name, value in headers if name.lower() not in _HOP_HEADERS]


def replica_url(server: str, path: str) -> httpx.URL:
    """The URL on a server of a request's path and query, whose beginning is taken for no host.

    Args:
        path: may have characters that a URL writes as escapes.

    Raises:
        httpx.InvalidURL: a path that no URL can have.
    """
    return httpx.URL(server).copy_with(raw_path=quote(path, safe=_IN_A_PATH).encode())


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        return int(probe_socket.getsockname()[1])
