"""Is every adapter at work? And how to ask it: requests to the running server, and examples of them."""

from __future__ import annotations

import json
import shlex
import ssl
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from soka_serve.errors import ServeError
from soka_serve.serving.command import Launch
from soka_serve.serving.targets import Target

# Prose, figures and code: whatever an adapter was trained for, it acts on some of this.
_TEXT = (
    "Question: Anna has 3 red apples and 12 green ones. She gives 5 of them to Ben. How many are left?\n"
    "Answer: 3 + 12 - 5 = 10.\n\ndef add(a, b):\n    return a + b\n\nThe weather will be fine until the weekend."
)
_TIMEOUT_S = 300.0
_EXAMPLE_TOKENS = 64


def probe(launch: Launch, targets: Sequence[Target]) -> dict[str, float]:
    """Ask base and adapters for the log-probabilities of one prompt.

    Returns:
        For each adapter its largest difference from the base, in nats.

    Raises:
        ServeError: an adapter that makes no difference, or an answer that is none.
    """
    noise, effects = measure_effects(launch, [t.name for t in targets])
    idle = [t for t in targets if effects[t.name] <= 10 * noise]
    if idle:
        lines = [f"{t.given}: the adapter {t.name!r} has no effect: the server answers as the base does" for t in idle]
        raise ServeError(
            "\n".join(lines),
            hint="Is it an untrained adapter, one of zeros? `soka-serve inspect` shows its norms; `soka-serve doctor` "
            "says whether the plugin is at work.",
        )
    return effects


def measure_effects(launch: Launch, names: Sequence[str]) -> tuple[float, dict[str, float]]:
    """By how much the log-probabilities of one prompt differ from the base's, in nats.

    Returns:
        What two answers of the base differ by, and the largest difference of each named model.

    Raises:
        ServeError: an answer that is none.
    """
    context = served_context(launch)
    base = _logprobs(launch, launch.base_model, context)
    # The same twice: whatever it differs by is the machine's, not an adapter's.
    noise = _difference(base, _logprobs(launch, launch.base_model, context))
    return noise, {name: _difference(base, _logprobs(launch, name, context)) for name in names}


def examples(launch: Launch, target: Target) -> tuple[str, str]:
    """A curl line and a Python line that ask a target something."""
    prompt = target.prompt or "Hello"
    body = {"model": target.name, "prompt": prompt, "max_tokens": _EXAMPLE_TOKENS, "temperature": 0}
    headers = "-H 'content-type: application/json'"
    headers += ' -H "Authorization: Bearer $VLLM_API_KEY"' if launch.api_key else ""
    curl = f"curl {launch.url}/v1/completions {headers} -d {shlex.quote(json.dumps(body))}"
    secret = 'os.environ["VLLM_API_KEY"]' if launch.api_key else '"none"'
    # JSON's strings are Python's too, and leave single quotes to the shell.
    asked = f"model={json.dumps(target.name)}, prompt={json.dumps(prompt)}"
    arguments = f"{asked}, max_tokens={_EXAMPLE_TOKENS}, temperature=0"
    python = (
        f"{'import os; ' if launch.api_key else ''}from openai import OpenAI; "
        f'print(OpenAI(base_url="{launch.url}/v1", api_key={secret}).completions.create({arguments}).choices[0].text)'
    )
    return curl, python


def served_models(launch: Launch) -> list[dict[str, Any]]:
    """What the server says that it serves: vLLM's cards, with `id`, `root` and, of adapters, `parent`.

    Raises:
        ServeError: no answer, or one that is none.
    """
    reply = _ask(launch, "/v1/models")
    cards = reply.get("data") if isinstance(reply, dict) else None
    if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
        raise ServeError(f"{launch.url}/v1/models: expected a list of models, got {str(reply)[:300]}")
    return cards


def served_context(launch: Launch) -> int | None:
    """The longest context that the server takes, as it says itself."""
    for card in served_models(launch):
        if card.get("id") == launch.base_model and isinstance(card.get("max_model_len"), int):
            return int(card["max_model_len"])
    return None


def _logprobs(launch: Launch, model: str, context: int | None) -> list[float]:
    """Log-probability of each token of the text, from the second on."""
    body = {"model": model, "prompt": _TEXT, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    if context is not None and context < 2 * len(_TEXT):  # it may not hold the text: its end is enough
        body["truncate_prompt_tokens"] = context - 1
    reply = _ask(launch, "/v1/completions", body)
    try:
        rows = reply["choices"][0]["prompt_logprobs"]
        return [next(iter(row.values()))["logprob"] for row in rows if row]
    except (KeyError, IndexError, TypeError, AttributeError, StopIteration) as error:
        raise ServeError(f"{model}: no prompt_logprobs in the answer: {str(reply)[:300]}") from error


def _difference(one: Sequence[float], other: Sequence[float]) -> float:
    return max((abs(a - b) for a, b in zip(one, other, strict=True)), default=0.0)


def _ask(launch: Launch, path: str, body: dict[str, Any] | None = None) -> Any:
    """The answer to a GET, or to a POST of a body."""
    what = path if body is None else str(body["model"])
    headers = {"content-type": "application/json"}
    if launch.api_key:
        headers["authorization"] = f"Bearer {launch.api_key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(launch.url + path, data, headers)
    context = ssl._create_unverified_context() if launch.scheme == "https" else None
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=context) as reply:
            return json.loads(reply.read())
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")[:500]
        raise ServeError(f"{what}: the server answered {error.code}: {said}") from error
    except (OSError, ValueError) as error:
        raise ServeError(f"{what}: the server did not answer: {error}") from error
