"""Malformed adapters and load requests on a real server: each refused with the reason, and no harm done."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from soka_serve.adapter.format import CONFIG_FILE, WEIGHTS_FILE
from tests.support.hostile_adapters import hole
from tests.support.malformed import HOSTILE, MALFORMED
from tests.support.serve_adapters import BETA, LOKR, LORA, TARGET_OPTIONS, clear_jobs, write_peft, write_soka
from tests.support.serving import ONE_PROCESS, Server, base_model, random_factors, serve

pytestmark = pytest.mark.slow

NAME = "fresh"  # no adapter of this name is served between two tests


@dataclass
class HarmCheck:
    """A server and what it answers as long as it is unharmed."""

    server: Server
    folder: Path
    jobs: dict[str, list[tuple[str, list[int], list[int]]]]

    def load(self, path: str | Path, name: str = NAME, **more: Any) -> tuple[int, Any]:
        return self.server.load(name, path, **more)

    def names(self) -> list[str]:
        return [card["id"] for card in self.server.get("/v1/models")["data"]]

    def check_answers(self, *names: str) -> None:
        """The greedy answers of `names`, which rounding cannot change; NAME answers as "beta" does."""
        for name in names:
            for _, prompt, answer in self.jobs["beta" if name == NAME else name]:
                assert self.server.ask(name, prompt, len(answer))[0] == answer, name

    def check_refused(self, reply: tuple[int, Any], reason: str, status: int = 400) -> None:
        """A refusal for this reason, which left nothing behind; a good adapter may have the name afterwards."""
        assert reply[0] == status, reply
        message = reply[1]["error"]["message"]
        assert reason in message, message
        assert "Traceback" not in message, message
        assert 'File "' not in message, message
        assert self.names() == ["base", "beta", "lora"]
        body = {"model": NAME, "prompt": [1], "max_tokens": 1}
        assert self.server.post("/v1/completions", body)[0] == 404
        self.check_answers("base", "beta", "lora")
        assert self.load(self.folder / "beta")[0] == 200
        self.check_answers(NAME, "base")
        assert self.server.unload(NAME)[0] == 200


@pytest.fixture(scope="module")
def harm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HarmCheck]:
    folder = tmp_path_factory.mktemp("malformed")
    references = {
        "base": base_model(),
        "beta": write_soka(folder / "beta", random_factors(BETA, 4, seed=2, scale=0.04)),
        "lora": write_peft(folder / "lora", LORA, seed=3),
    }
    write_peft(folder / "lokr", LOKR, seed=3)
    jobs: dict[str, list[tuple[str, list[int], list[int]]]] = {name: [] for name in references}
    for job in clear_jobs(references, list(references), [20], each=1, tokens=6, seed=1):
        jobs[job[0]].append(job)
    assert jobs["beta"][0][2] != jobs["base"][0][2]
    options = [*TARGET_OPTIONS, "--max-loras", "2", "--max-cpu-loras", "3", "--max-lora-rank", "8"]
    options += ["--lora-modules", *(f"{name}={folder / name}" for name in ("beta", "lora"))]
    with serve(folder, options, more=ONE_PROCESS) as server:
        yield HarmCheck(server, folder, jobs)


def copy_of(harm: HarmCheck, start: str, name: str) -> Path:
    folder = harm.folder / "bad" / name
    shutil.copytree(harm.folder / start, folder)
    return folder


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_adapters_are_refused(harm: HarmCheck, kind: str) -> None:
    start, spoil, reason = MALFORMED[kind]
    folder = copy_of(harm, start, kind)
    spoil(folder)
    harm.check_refused(harm.load(folder), reason)


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_adapters_are_refused_or_served(harm: HarmCheck, kind: str) -> None:
    """At once, in a few lines, and with no more memory."""
    start, spoil, reason = HOSTILE[kind]
    folder = copy_of(harm, start, f"hostile {kind}")
    spoil(folder)
    logged = harm.server.log.stat().st_size
    started = time.monotonic()
    reply = harm.load(folder)
    assert time.monotonic() - started < 10
    if not reason:
        assert reply[0] == 200, reply
        assert harm.server.ask(NAME, [1, 2, 3], 4) == harm.server.ask(NAME, [1, 2, 3], 4)
        assert harm.server.unload(NAME)[0] == 200
        harm.check_answers("base", "beta", "lora")
        return
    assert len(json.dumps(reply[1])) < 10_000
    assert harm.server.log.stat().st_size - logged < 50_000
    harm.check_refused(reply, reason)
    shutil.rmtree(folder)


def test_a_hostile_lock_of_the_build(harm: HarmCheck) -> None:
    """An adapter without a soka.lock is held against that of the folder it lies in."""
    folder = copy_of(harm, "beta", "hostile build/adapter")
    hole("soka.lock")(folder.parent)
    harm.check_refused(harm.load(folder), "soka.lock: 3221225472 bytes, too large")


def test_there_are_enough_kinds() -> None:
    assert len(MALFORMED) >= 75


def test_a_client_that_never_stops_keeps_nobody_out(harm: HarmCheck) -> None:
    """Both adapters of a step are asked for at any time; a third one has its turn all the same."""
    stop = threading.Event()

    def ask_on(name: str, tokens: int) -> int:
        count = 0
        while not stop.is_set():
            harm.server.ask(name, [1, 2, 3], tokens)
            count += 1
        return count

    with ThreadPoolExecutor(6) as pool:
        # Of several lengths: where all of an adapter's end in one step, another one comes in.
        greedy = [pool.submit(ask_on, name, tokens) for name in ("beta", "lora") for tokens in (70, 90, 110)]
        try:
            assert harm.load(harm.folder / "lokr")[0] == 200
            for _ in range(3):
                harm.server.ask(NAME, [1, 2, 3], 4)
        finally:
            stop.set()
    assert all(client.result() for client in greedy)
    harm.check_answers("base", "beta", "lora")
    assert harm.server.unload(NAME)[0] == 200


def test_a_malformed_rebuild_leaves_what_was_served(harm: HarmCheck) -> None:
    """In place of an adapter, from its own folder and from another: refused, and the old one goes on answering."""
    for kind in ("not a number", "truncated data", "no sigma", "wrong shape", "config is a list"):
        _, spoil, reason = MALFORMED[kind]
        folder = copy_of(harm, "beta", f"rebuilt {kind}")
        spoil(folder)
        harm.check_refused(harm.load(folder, "beta", load_inplace=True), reason)
    kept = harm.folder / "kept"
    shutil.copytree(harm.folder / "beta", kept)
    _, spoil, reason = MALFORMED["infinite"]
    spoil(harm.folder / "beta")
    reply = harm.load(harm.folder / "beta", "beta", load_inplace=True)
    shutil.copytree(kept, harm.folder / "beta", dirs_exist_ok=True)
    harm.check_refused(reply, reason)


def test_unreadable_files(harm: HarmCheck) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads every file")
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        folder = copy_of(harm, "beta", f"unreadable {file}")
        (folder / file).chmod(0)
        harm.check_refused(harm.load(folder), file)


def test_paths_that_are_no_adapter(harm: HarmCheck) -> None:
    folder = harm.folder / "paths"
    folder.mkdir()
    (folder / "file").write_text("x")
    no_config = copy_of(harm, "beta", "no config")
    (no_config / CONFIG_FILE).unlink()
    (folder / "empty").mkdir()
    (folder / "loop").symlink_to("loop")
    for path in (folder / "nowhere", folder / "empty", no_config):
        harm.check_refused(harm.load(path), "No adapter found", 404)
    harm.check_refused(harm.load(folder / "file"), "Not a directory")
    harm.check_refused(harm.load(folder / "loop"), "symbolic links")
    harm.check_refused(harm.load(f"{folder}/a\0b"), "null")
    harm.check_refused(harm.load("/" + "x" * 5000), "too long")


def test_paths_with_dots(harm: HarmCheck) -> None:
    """Also where they lead to an adapter."""
    harm.check_refused(harm.load(harm.folder / "lora" / ".." / "beta"), "..")
    harm.check_refused(harm.load("../../../../../../etc"), "..")
    harm.check_refused(harm.load("beta/../beta"), "..")


def test_names_that_cannot_be(harm: HarmCheck) -> None:
    good = harm.folder / "beta"
    harm.check_refused(harm.load(good, ""), "must be provided")
    harm.check_refused(harm.load("", NAME), "must be provided")
    harm.check_refused(harm.load(good, "base"), "conflicts with a served base model")
    harm.check_refused(harm.load(good, "beta"), "has already been loaded")


def test_requests_that_are_none(harm: HarmCheck) -> None:
    for body in ({}, {"lora_name": NAME}, {"lora_name": 3, "lora_path": []}):
        harm.check_refused(harm.server.post("/v1/load_lora_adapter", body), "lora_path")
    harm.check_refused(harm.server.unload("nobody"), "nobody", 404)


def test_the_log_has_the_reasons(harm: HarmCheck) -> None:
    """Refusals are logged with the name that was asked for."""
    folder = copy_of(harm, "beta", "for the log")
    (folder / CONFIG_FILE).write_text(json.dumps({"peft_type": "LOHA"}))
    harm.check_refused(harm.load(folder), "LOHA")
    refusals = [line for line in harm.server.log.read_text().splitlines() if f"Refused adapter '{NAME}'" in line]
    assert "peft_type is 'LOHA'" in refusals[-1]
