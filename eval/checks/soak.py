"""Mixed load on a real server for an hour, adapters loaded, unloaded and replaced meanwhile, and what goes wrong.

python -m eval.checks.soak --minutes 60 --out eval/results/soak.json

The embedded base in vLLM on the CPU, float32: four slots, a cache of eight, and sixteen adapters of all kinds (SoKA,
LoRA, LoKr). Clients ask random adapters one after the other, with `--pause` seconds between; every answer is held
against the greedy tokens of transformers with that adapter's dense delta, on prompts where rounding cannot change them.
Meanwhile an operator, all the time:

- replaces an adapter in place by another one of the same name, and back. A request that began after that must get the
  new one's answer, one that ended before it the old one's. One that ran meanwhile may change adapters half way: vLLM
  swaps the weights under it. Only the first token of its answer is known, either one's; `changed half way` counts them;
- unloads an adapter and loads it again. A request that overlaps may be refused with 404, none otherwise;
- swaps in a corrupted rebuild: it must be refused with 400, and the old adapter goes on answering.

Every ten seconds the memory of all the server's processes (proportional set size) is noted; `memory.slope_mb_per_hour`
is fitted to the second half, with the standard error of the fit from residuals in blocks of a minute. At the end the
engine's process is killed: clients must get errors, not wait, the server must end by itself, and a new one on the same
adapters must answer rightly.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import tempfile
import threading
import time
import urllib.error
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[2]

import psutil  # noqa: E402

from eval.record import make_parser, write_record  # noqa: E402
from soka_serve.io.file_names import WEIGHTS_FILE  # noqa: E402
from tests.support.serve_adapters import ALPHA, TARGET_OPTIONS, clear_jobs, write_many, write_soka  # noqa: E402
from tests.support.serving import Server, random_factors, serve  # noqa: E402

ADAPTERS = 16
REPLACED, UNLOADED = "a0", "a1"
TOKENS = 8
Job = tuple[list[int], list[int]]  # a prompt and its greedy answer


class AnswerLedger:
    """What may be answered when, and what was."""

    def __init__(self, jobs: dict[str, list[Job]], others: list[Job]) -> None:
        self.jobs = jobs
        self.others = others  # of what takes the place of REPLACED, on the same prompts
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.wrong: list[dict[str, Any]] = []
        self.seconds: list[float] = []
        self._live: dict[int, list[float]] = {0: [0.0, float("inf")]}  # versions of REPLACED: first and last moment
        self._version, self._away = 0, [(0.0, 0.0)]

    @contextmanager
    def replacing(self) -> Iterator[int]:
        """Yields the version that comes; while this runs, the old and the new one may answer."""
        old, self._version = self._version, self._version + 1
        with self.lock:
            self._live[self._version] = [time.monotonic(), float("inf")]
        yield self._version
        with self.lock:
            self._live[old][1] = time.monotonic()

    @contextmanager
    def away(self) -> Iterator[None]:
        """While this runs, UNLOADED may be missing."""
        start = time.monotonic()
        with self.lock:
            self._away.append((start, float("inf")))
        yield
        with self.lock:
            self._away[-1] = (start, time.monotonic())

    def allowed(self, name: str, at: int, start: float, end: float) -> list[list[int] | None]:
        """Right answers to a request that lasted from start to end; None stands for a refusal."""
        with self.lock:
            if name == REPLACED:
                live = {v % 2 for v, (first, last) in self._live.items() if first <= end and last >= start}
                return [(self.others if odd else self.jobs[name])[at][1] for odd in live]
            found: list[list[int] | None] = [self.jobs[name][at][1]]
            if name == UNLOADED and any(first <= end and last >= start for first, last in self._away):
                found.append(None)
            return found


def ask_for_ever(server: Server, books: AnswerLedger, stop: threading.Event, seed: int, pause_s: float) -> None:
    """One client."""
    chance = random.Random(seed)
    names = list(books.jobs)
    while not stop.wait(pause_s):
        name = chance.choice(names)
        at = chance.randrange(len(books.jobs[name]))
        start = time.monotonic()
        body = {"model": name, "prompt": books.jobs[name][at][0], "max_tokens": TOKENS, "temperature": 0}
        try:
            status, reply = server.post("/v1/completions", {**body, "return_token_ids": True, "ignore_eos": True})
            got = reply["choices"][0]["token_ids"] if status == 200 else None
        except (OSError, urllib.error.URLError) as error:
            status, reply, got = 0, repr(error), None
        end = time.monotonic()
        allowed = books.allowed(name, at, start, end)
        right = got in allowed and status in (200, 404)
        half_way = not right and name == REPLACED and len(allowed) == 2
        right = right or (half_way and got is not None and got[:1] in [answer[:1] for answer in allowed if answer])
        with books.lock:
            books.counts["requests"] += 1
            books.counts["changed half way"] += half_way and right
            books.counts["refused while unloaded"] += right and got is None
            books.seconds.append(end - start)
            if not right:
                books.counts["wrong answers" if status == 200 else "errors"] += 1
                if len(books.wrong) < 20:
                    books.wrong.append({"model": name, "status": status, "reply": str(reply)[:300]})


def operate(server: Server, books: AnswerLedger, folder: Path, stop: threading.Event) -> None:
    """Load, unload, replace, and swap in what is broken, over and over."""

    def load(name: str, place: str, **more: Any) -> int:
        return server.load(name, folder / place, **more)[0]

    def expect(what: str, got: int, wanted: int) -> None:
        with books.lock:
            books.counts[what] += 1
            if got != wanted:
                books.counts["errors"] += 1
                books.wrong.append({"operation": what, "status": got})

    while not stop.is_set():
        with books.replacing() as version:
            place = "other" if version % 2 else REPLACED
            expect("replacements", load(REPLACED, place, load_inplace=True), 200)
        stop.wait(1)
        with books.away():
            expect("unloads", server.unload(UNLOADED)[0], 200)
            stop.wait(0.2)
            expect("loads", load(UNLOADED, UNLOADED), 200)
        expect("corrupted rebuilds refused", load("a2", "corrupted", load_inplace=True), 400)
        stop.wait(1)


def processes(server: Server) -> list[psutil.Process]:
    """The server's."""
    first = psutil.Process(server.pid)
    return [first, *first.children(recursive=True)]


def memory_mb(server: Server) -> float:
    """Proportional set size of all of them."""
    total = 0
    for process in processes(server):
        try:
            total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return round(total / 1e6, 2)


def slope(samples: list[tuple[float, float]]) -> dict[str, float]:
    """Megabytes an hour over the second half, and the standard error from means of a minute each."""
    half = [s for s in samples if s[0] >= samples[-1][0] / 2]
    minutes: dict[int, list[tuple[float, float]]] = {}
    for hours, mb in half:
        minutes.setdefault(int(hours * 60), []).append((hours, mb))
    points = [(statistics.mean(h for h, _ in m), statistics.mean(mb for _, mb in m)) for m in minutes.values()]
    if len(points) < 3:
        return {"slope_mb_per_hour": float("nan"), "standard_error": float("nan")}
    fit = statistics.linear_regression([h for h, _ in points], [mb for _, mb in points])
    residuals = [mb - fit.intercept - fit.slope * h for h, mb in points]
    spread = sum((h - statistics.mean(h for h, _ in points)) ** 2 for h, _ in points)
    error = (sum(r * r for r in residuals) / (len(points) - 2) / spread) ** 0.5
    return {"slope_mb_per_hour": round(fit.slope, 2), "standard_error": round(error, 2)}


def kill_engine(server: Server, books: AnswerLedger) -> dict[str, Any]:
    """Kill the engine; what the clients and the server make of it."""
    name = next(iter(books.jobs))
    engine = next(p for p in processes(server) if "EngineCore" in p.name() or "EngineCore" in " ".join(p.cmdline()))
    first = psutil.Process(server.pid)
    started = time.monotonic()
    engine.send_signal(signal.SIGKILL)
    status: int | str
    try:
        status = server.post("/v1/completions", {"model": name, "prompt": books.jobs[name][0][0], "max_tokens": 4})[0]
    except OSError as error:
        status = type(error).__name__
    answered = time.monotonic() - started
    gone, _ = psutil.wait_procs([first], timeout=120)
    return {
        "a request then": status,
        "answered_after_s": round(answered, 2),
        "server_ended_by_itself": bool(gone) or first.status() == psutil.STATUS_ZOMBIE,
        "ended_after_s": round(time.monotonic() - started, 1),
    }


def main() -> None:
    parser = make_parser("eval.checks.soak", __doc__, needs_out=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--pause", type=float, default=0, help="seconds between a client's requests")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        references = write_many(folder, ADAPTERS)
        found: dict[str, list[Job]] = {name: [] for name in references}
        for name, prompt, answer in clear_jobs(references, list(references), [20, 40, 150], 4, TOKENS, seed=1):
            found[name].append((prompt, answer))
        # The same prompts have to be clear for both versions: those of the other one are asked of the first one too.
        other = write_soka(folder / "other", random_factors(ALPHA, 2, seed=999, scale=0.04))
        found[REPLACED], others = shared_jobs({REPLACED: references[REPLACED], "other": other})
        shutil.copytree(folder / "a2", folder / "corrupted")
        weights = folder / "corrupted" / WEIGHTS_FILE
        weights.write_bytes(weights.read_bytes()[:-8] + b"\xff" * 8)  # not a number
        del references, other
        books = AnswerLedger(found, others)
        options = [*TARGET_OPTIONS, "--max-loras", "4", "--max-cpu-loras", "8", "--max-lora-rank", "8"]
        options += ["--lora-modules", *(f"a{i}={folder / f'a{i}'}" for i in range(ADAPTERS))]
        samples: list[tuple[float, float]] = []
        with serve(folder, options) as server:
            stop = threading.Event()
            threads = [
                threading.Thread(target=ask_for_ever, args=(server, books, stop, i, arguments.pause))
                for i in range(arguments.clients)
            ]
            threads.append(threading.Thread(target=operate, args=(server, books, folder, stop)))
            started = time.monotonic()
            for thread in threads:
                thread.start()
            while time.monotonic() - started < 60 * arguments.minutes:
                time.sleep(10)
                samples.append(((time.monotonic() - started) / 3600, memory_mb(server)))
                print(f"{samples[-1][0] * 60:.1f} min: {samples[-1][1]:.0f} MB, {dict(books.counts)}", flush=True)
            stop.set()
            for thread in threads:
                thread.join()
            killed = kill_engine(server, books)
        (folder / "again").mkdir()
        with serve(folder / "again", options) as server:
            again = [server.ask(name, prompt, TOKENS)[0] == answer for name in found for prompt, answer in found[name]]
        taken = sorted(books.seconds)
        report = {
            **{what: books.counts[what] for what in ("requests", "errors", "wrong answers")},
            **dict(books.counts),
            "examples_of_what_went_wrong": books.wrong,
            "latency_s": {"median": round(taken[len(taken) // 2], 3), "p99": round(taken[len(taken) * 99 // 100], 3)},
            "memory": {**slope(samples), "mb_every_10_s": [mb for _, mb in samples]},
            "engine_killed": {**killed, "right_after_restart": sum(again), "of": len(again)},
        }
    write_record(arguments, report)
    print(json.dumps({k: v for k, v in report.items() if k != "memory"} | {"memory": slope(samples)}, indent=1))


def shared_jobs(models: dict[str, Any]) -> tuple[list[Job], list[Job]]:
    """Prompts that both models answer clearly and differently, with the answers of the first and of the second."""
    import torch

    from tests.support.serve_adapters import ATOL_NATS, expected_answers

    prompts = torch.randint(3, 600, (40, 20), generator=torch.Generator().manual_seed(7))
    (one, lead_one), (two, lead_two) = (expected_answers(model, prompts, TOKENS) for model in models.values())
    good = ((torch.minimum(lead_one, lead_two) > 10 * ATOL_NATS) & (one != two).any(1)).nonzero().flatten().tolist()[:4]
    assert len(good) == 4
    return [(prompts[i].tolist(), one[i].tolist()) for i in good], [
        (prompts[i].tolist(), two[i].tolist()) for i in good
    ]


if __name__ == "__main__":
    main()
