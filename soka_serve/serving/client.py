"""A running vLLM server as its clients see it: where it is, whether it answers, what it serves, what it says."""

from __future__ import annotations

import ipaddress
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from soka_serve.errors import ServeError

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000

# Prose, figures and code: whatever an adapter was trained for, it acts on some of this.
_TEXT = (
    "Question: Anna has 3 red apples and 12 green ones. She gives 5 of them to Ben. How many are left?\n"
    "Answer: 3 + 12 - 5 = 10.\n\ndef add(a, b):\n    return a + b\n\nThe weather will be fine until the weekend."
)
_TIMEOUT_S = 300.0
_HEALTH_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """How a server is reached.

    Args:
        host, port: where it listens.
        scheme: http, or https when vLLM was given a certificate.
        base_model: name of the base (or of the merged model) in the API.
        api_key: what it asks clients for; empty when nothing.
    """

    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    scheme: str = "http"
    base_model: str = ""
    api_key: str = ""

    @property
    def url(self) -> str:
        """Where a client on this machine finds it."""
        host = self._host
        return f"{self.scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether a client on this machine finds it at an address that leads nowhere else."""
        try:
            return ipaddress.ip_address(self._host).is_loopback
        except ValueError:
            return self._host == "localhost"

    @property
    def _host(self) -> str:
        return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)


class Client:
    """Asks one server.

    Args:
        endpoint: how it is reached.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        # The server's own certificate need not name this machine; who answers is not in question here.
        handlers: list[urllib.request.BaseHandler] = []
        if endpoint.scheme == "https":
            handlers.append(urllib.request.HTTPSHandler(context=ssl._create_unverified_context()))
        if endpoint.is_loopback:  # to a proxy it would be another machine
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def is_healthy(self) -> bool:
        """Whether it answers, and its engine lives."""
        return self.health() is True

    def health(self) -> bool | None:
        """As `is_healthy`; None where there is no answer yet, as of a busy one."""
        try:
            self._send("/health", timeout_s=_HEALTH_TIMEOUT_S)
        except (OSError, ValueError) as error:
            late = isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError)
            return None if late else False
        return True

    def models(self) -> list[dict[str, Any]]:
        """What the server says that it serves: vLLM's cards, with `id`, `root` and, of adapters, `parent`.

        Raises:
            ServeError: no answer, or one that is none.
        """
        reply = self._ask("/v1/models")
        cards = reply.get("data") if isinstance(reply, dict) else None
        if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
            raise ServeError(f"{self._endpoint.url}/v1/models: expected a list of models, got {str(reply)[:300]}")
        return cards

    def context(self) -> int | None:
        """The longest context in tokens that the server takes, as it says itself; None where it does not."""
        for card in self.models():
            if card.get("id") == self._endpoint.base_model and isinstance(card.get("max_model_len"), int):
                return int(card["max_model_len"])
        return None

    def effects(self, names: Sequence[str]) -> tuple[float, dict[str, float]]:
        """By how much the log-probabilities of one prompt differ from the base's, in nats.

        Returns:
            What two answers of the base differ by, and the largest difference of each named model.

        Raises:
            ServeError: an answer that is none.
        """
        context, model = self.context(), self._endpoint.base_model
        base = self._logprobs(model, context)
        # The same twice: whatever it differs by is the machine's, not an adapter's.
        noise = _difference(base, self._logprobs(model, context))
        return noise, {name: _difference(base, self._logprobs(name, context)) for name in names}

    def finished_requests(self, adapter: str) -> float | None:
        """Finished requests of an adapter, as the plugin counts them; None where the server has no such metric."""
        try:
            lines = self._send("/metrics").decode().splitlines()
        except (OSError, ValueError):
            return None
        if not any(line.startswith("# TYPE soka:") for line in lines):
            return None
        start = f'soka:requests_total{{adapter="{adapter}",'
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(start))

    def started_at(self) -> float | None:
        """When the server began, in seconds since the epoch; None where it does not say."""
        try:
            lines = self._send("/metrics").decode().splitlines()
        except (OSError, ValueError):
            return None
        found = [line.rpartition(" ")[2] for line in lines if line.startswith("process_start_time_seconds ")]
        return float(found[0]) if found else None

    def _logprobs(self, model: str, context: int | None) -> list[float]:
        """Log-probability of each token of the text, from the second on."""
        body = {"model": model, "prompt": _TEXT, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        if context is not None and context < 2 * len(_TEXT):  # it may not hold the text: its end is enough
            body["truncate_prompt_tokens"] = context - 1
        reply = self._ask("/v1/completions", body)
        try:
            rows = reply["choices"][0]["prompt_logprobs"]
            return [next(iter(row.values()))["logprob"] for row in rows if row]
        except (KeyError, IndexError, TypeError, AttributeError, StopIteration) as error:
            raise ServeError(f"{model}: no prompt_logprobs in the answer: {str(reply)[:300]}") from error

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer to a GET, or to a POST of a body."""
        what = path if body is None else str(body["model"])
        try:
            return json.loads(self._send(path, body))
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:500]
            raise ServeError(f"{what}: the server answered {error.code}: {said}") from error
        except (OSError, ValueError) as error:
            raise ServeError(f"{what}: the server did not answer: {error}") from error

    def _send(self, path: str, body: dict[str, Any] | None = None, timeout_s: float = _TIMEOUT_S) -> bytes:
        headers = {"content-type": "application/json"}
        if self._endpoint.api_key:
            headers["authorization"] = f"Bearer {self._endpoint.api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._endpoint.url + path, data, headers)
        with self._opener.open(request, timeout=timeout_s) as reply:
            return bytes(reply.read())


def _difference(one: Sequence[float], other: Sequence[float]) -> float:
    return max((abs(a - b) for a, b in zip(one, other, strict=True)), default=0.0)
