"""The front of a Ray Serve application: takes requests, sends each to a replica, and again if the replica is lost."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from soka_serve.serving.replica import AnswerHead, Asked, BrokenOffError, ReplicaLostError, replica_url
from soka_serve.serving.replica_metrics import CONTENT_TYPE, merge_metrics

logger = logging.getLogger("ray.serve")

_LOST = (RayActorError, ReplicaLostError, ReplicaUnavailableError, DeploymentUnavailableError)
_PAUSE_S = 0.2
_APART_S = 30.0
_MOST_ENDED = 3  # replicas that one request may take with it
_METRICS_S = 8  # Prometheus asks for 10 s
# What would reach one replica of several, which nobody can tell apart.
_OF_ONE_REPLICA = {
    "/v1/load_lora_adapter": "every replica loads adapters of the application's `builds` folder by their names",
    "/v1/unload_lora_adapter": "replicas unload the adapters that were not used for longest",
}


class Front:
    """Takes every request; Ray Serve makes one for each of the application's `fronts`.

    Args:
        replica: handle of the replicas.
        by_adapter: send requests where their adapter is.
        retry_s: for how long a request that lost its replica is sent again.
    """

    def __init__(self, replica: Any, *, by_adapter: bool, retry_s: float) -> None:
        self._replica = replica
        self._by_adapter = by_adapter
        self._retry_s = retry_s
        self._base_names: frozenset[str] = frozenset()

    async def __call__(self, request: Request) -> Response:
        """Answer a request as a replica's vLLM answers it."""
        query = f"?{request.url.query}" if request.url.query else ""
        try:
            sent = replica_url("http://replica", request.url.path + query)
        except httpx.InvalidURL as error:
            return _refusal(400, "BadRequestError", f"the path of the request cannot be passed on: {error}")
        path = sent.path  # as a replica's vLLM gets it: without '..', say
        if (reason := _OF_ONE_REPLICA.get(path.rstrip("/"))) is not None:
            return _refusal(400, "BadRequestError", f"{path} is not served here: {reason}")
        if path.startswith("/metrics"):  # whatever follows, vLLM answers with all
            return await self._metrics()
        body = await request.body()
        asked = Asked(request.method, sent.raw_path.decode(), tuple(request.headers.items()), body)
        last, ended, broken = "", set(), 0
        deadline = time.monotonic() + self._retry_s
        while True:
            try:
                return await self._ask(asked)
            except _LOST as error:
                last = _said(error)
                logger.warning("%s %s: its replica was lost: %s", request.method, path, last)
                ended.add(_ended_by(error))
            except BrokenOffError as error:
                last, broken = _said(error), broken + 1
                logger.warning("%s %s: no whole answer came: %s", request.method, path, last)
                if broken > 1:
                    return _refusal(502, "BadGatewayError", f"no whole answer came of a replica, twice: {last}")
            if len(ended - {""}) >= _MOST_ENDED:
                logger.error("%s %s: not sent again, %d replicas have died with it", request.method, path, _MOST_ENDED)
                return _refusal(
                    500, "InternalServerError", f"{_MOST_ENDED} replicas have died that had this request: {last}"
                )
            if time.monotonic() >= deadline:
                return _refusal(503, "ServiceUnavailableError", f"no replica has answered: {last}")
            # What is deadly may be another request that was beside this one twice: they come back at other times.
            await asyncio.sleep(_PAUSE_S if len(ended - {""}) < _MOST_ENDED - 1 else random.uniform(_PAUSE_S, _APART_S))

    async def _metrics(self) -> Response:
        """What all replicas count, with their names; without those that have none to give."""
        try:
            asked = self._replica.broadcast("metrics")
            found = await asked.results_async(timeout_s=_METRICS_S, return_exceptions=True)
        except (TimeoutError, *_LOST) as error:
            said = f"no metrics of all replicas in {_METRICS_S} s: {_said(error)}"
            return _refusal(503, "ServiceUnavailableError", said)
        pages: dict[str, str] = {}
        for one in found:
            if isinstance(one, BaseException):
                logger.warning("/metrics: without one replica: %s", _said(one))
            else:
                name, page = one
                pages[name] = page
        if not pages:
            return _refusal(503, "ServiceUnavailableError", "no replica has metrics to give")
        # Pages are long, and streams pass through this loop.
        return Response(await asyncio.to_thread(merge_metrics, pages), media_type=CONTENT_TYPE)

    async def _ask(self, asked: Asked) -> Response:
        adapter = await self._adapter(asked.body)
        asked = Asked(asked.method, asked.path, asked.headers, asked.body, adapter)
        chosen = {"multiplexed_model_id": adapter} if adapter and self._by_adapter else {}
        pieces = self._replica.options(stream=True, **chosen).forward.remote(asked)
        head: AnswerHead = await anext(pieces)
        if head.is_stream:
            first = await anext(pieces, b"")  # before anything is out, the request can be sent again
            answer: Response = StreamingResponse(_rest(first, pieces), head.status)
        else:
            answer = Response(b"".join([piece async for piece in pieces]), head.status)
        # Not by name: an answer may have several of one.
        answer.raw_headers += [(name.encode("latin-1"), value.encode("latin-1")) for name, value in head.headers]
        return answer

    async def _adapter(self, body: bytes) -> str:
        """The adapter that a request's body names; empty for the base, and for bodies that name none."""
        try:
            model = json.loads(body)["model"] if body else ""
        except (ValueError, KeyError, TypeError, RecursionError):
            return ""
        if not isinstance(model, str) or not model:
            return ""
        if not self._base_names:
            self._base_names = frozenset(await self._replica.base_names.remote())
        return "" if model in self._base_names else model


def _ended_by(error: Exception) -> str:
    """The replica that died while it had a request, or empty: Ray's own errors have the actor, dead before or not."""
    if isinstance(error, ActorUnavailableError):  # it lives
        return ""
    cause = getattr(error, "cause", error)
    return cause.replica if isinstance(cause, ReplicaLostError) else str(getattr(error, "actor_id", None) or "")


def _said(error: BaseException) -> str:
    """The first line of an error's own message: what Ray has made of it begins with the process it was raised in."""
    return str(getattr(error, "cause", error)).split("\n")[0]


async def _rest(first: bytes, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The pieces of a stream; its last is an error, as vLLM writes it, where the replica is lost on the way."""
    yield first
    try:
        async for piece in pieces:
            yield piece
    except _LOST as error:
        logger.warning("a stream ends with an error: its replica was lost: %s", _said(error))
        yield b"data: " + _error(503, "ServiceUnavailableError", "the replica was lost; ask again") + b"\n\n"
    except BrokenOffError as error:
        logger.warning("a stream ends with an error: %s", _said(error))
        yield b"data: " + _error(502, "BadGatewayError", f"the answer broke off: {_said(error)}") + b"\n\n"


def _error(status: int, kind: str, message: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}}).encode()


def _refusal(status: int, kind: str, message: str) -> Response:
    return JSONResponse(json.loads(_error(status, kind, message)), status)
