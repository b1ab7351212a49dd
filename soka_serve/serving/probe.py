"""Is every adapter at work? And how to ask it: examples of requests to the running server."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

from soka_serve.errors import ServeError
from soka_serve.serving.client import Client, Endpoint
from soka_serve.serving.targets import Target

_EXAMPLE_TOKENS = 64


def probe(endpoint: Endpoint, targets: Sequence[Target]) -> dict[str, float]:
    """Ask base and adapters for the log-probabilities of one prompt.

    Returns:
        For each adapter its largest difference from the base, in nats.

    Raises:
        ServeError: an adapter that makes no difference, or an answer that is none.
    """
    noise, effects = Client(endpoint).effects([t.name for t in targets])
    idle = [t for t in targets if effects[t.name] <= 10 * noise]
    if idle:
        lines = [f"{t.given}: the adapter {t.name!r} has no effect: the server answers as the base does" for t in idle]
        raise ServeError(
            "\n".join(lines),
            hint="Is it an untrained adapter, one of zeros? `soka-serve inspect` shows its norms; `soka-serve doctor` "
            "says whether the plugin is at work.",
        )
    return effects


def examples(endpoint: Endpoint, target: Target) -> tuple[str, str]:
    """A curl line and a Python line that ask a target something."""
    prompt = target.prompt or "Hello"
    body = {"model": target.name, "prompt": prompt, "max_tokens": _EXAMPLE_TOKENS, "temperature": 0}
    headers = "-H 'content-type: application/json'"
    headers += ' -H "Authorization: Bearer $VLLM_API_KEY"' if endpoint.api_key else ""
    curl = f"curl {endpoint.url}/v1/completions {headers} -d {shlex.quote(json.dumps(body))}"
    secret = 'os.environ["VLLM_API_KEY"]' if endpoint.api_key else '"none"'
    # JSON's strings are Python's too, and leave single quotes to the shell.
    asked = f"model={json.dumps(target.name)}, prompt={json.dumps(prompt)}"
    arguments = f"{asked}, max_tokens={_EXAMPLE_TOKENS}, temperature=0"
    python = (
        f"{'import os; ' if endpoint.api_key else ''}from openai import OpenAI; "
        f'print(OpenAI(base_url="{endpoint.url}/v1", api_key={secret}).completions.create({arguments}).choices[0].text)'
    )
    return curl, python
