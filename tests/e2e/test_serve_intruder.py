"""A client, and a local user who can write to the folder that adapters may come from, against a real server.

What they get at is what the operator has allowed: no file outside the folder, no cache, no log line, no metric of
their own.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from soka_serve.adapter.format import CONFIG_FILE, WEIGHTS_FILE
from soka_serve.base.checkpoint import Checkpoint
from soka_serve.builtin import base_directory
from soka_serve.io.lockfile import write_lock
from tests.support.serve_adapters import BETA, LORA, TARGET_OPTIONS, write_peft, write_soka
from tests.support.serving import ONE_PROCESS, Server, random_factors, serve

pytestmark = pytest.mark.slow

PROMPT = [1, *range(40, 60)]
LOADS = 100
SWAPS = 2000


@dataclass
class AttackedServer:
    """A server; `roots` is the folder that clients may load from, `builds` the one that is served by name."""

    server: Server
    roots: Path
    builds: Path
    outside: Path

    def load(self, name: str, path: str | Path, **more: Any) -> tuple[int, Any]:
        return self.server.load(name, path, **more)

    def unload(self, name: str) -> None:
        status, reply = self.server.unload(name)
        assert status == 200, reply

    def answer(self, name: str) -> list[float]:
        return self.server.ask(name, PROMPT, 2)[1]

    def series(self) -> set[str]:
        """The label sets of the API process's counters."""
        kinds = ("soka:requests_total{", "soka:prompt_tokens_total{", "soka:generation_tokens_total{")
        lines = self.server.get("/metrics").splitlines()
        return {line.rpartition(" ")[0] for line in lines if line.startswith(kinds)}


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AttackedServer]:
    folder = tmp_path_factory.mktemp("attacked")
    roots, builds, outside = (folder / name for name in ("roots", "builds", "outside"))
    for at, place in enumerate((roots / "good", outside / "good", builds / "built")):
        write_soka(place, random_factors(BETA, 1, seed=at, scale=0.08))
    # The same module names and shapes inside and outside, so that files of both fit together.
    for place in (roots, outside):
        write_peft(place / "lora", LORA, seed=len(place.name))
    own = folder / "own"
    write_soka(own, random_factors(BETA, 1, seed=9, scale=0.08))
    options = [*TARGET_OPTIONS, "--max-loras", "2", "--max-cpu-loras", "2", "--max-lora-rank", "8"]
    options += ["--lora-modules", f"own={own}"]
    environment = {
        **ONE_PROCESS,
        "SOKA_ADAPTER_ROOTS": str(roots),
        "SOKA_BUILDS": str(builds),
        "SOKA_KEEP_ADAPTERS_GIB": "0",  # an adapter that left its slot is read again
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    with serve(folder, options, more=environment) as server:
        yield AttackedServer(server, roots, builds, outside)


@contextmanager
def swapping(link: Path, good: Path, bad: Path) -> Iterator[list[int]]:
    """A thread that has a link lead to one place, then to the other; yields a list that counts."""
    stop, count = threading.Event(), [0]

    def swap() -> None:
        spare = link.with_name(f"{link.name}.new")
        while not stop.is_set():
            for target, seconds in ((good, 0.004), (bad, 0.001)):
                spare.symlink_to(target)
                spare.replace(link)
                count[0] += 1
                time.sleep(seconds)

    link.parent.mkdir(parents=True, exist_ok=True)
    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield count
    finally:
        stop.set()
        thread.join()


def test_a_neighbours_hash_cache_is_not_read(attacked: AttackedServer) -> None:
    """First, since the base is hashed once. Nobody writes to the pipe; whoever opens it waits for good."""
    folder = attacked.roots / "build" / "adapter"
    shutil.copytree(attacked.roots / "good", folder)
    write_lock(folder / "soka.lock", {"base": {"sha256": Checkpoint.open(base_directory()).sha256()}})
    (attacked.roots / ".cache").mkdir()
    os.mkfifo(attacked.roots / ".cache" / "hashes.json")
    (attacked.roots / "build" / "check.json").symlink_to("/dev/zero")
    status, reply = attacked.load("first", folder)
    assert status == 200, reply
    attacked.unload("first")


@pytest.mark.parametrize("kind", ["a folder", "weights of SoKA", "config and weights of LoRA"])
def test_links_that_change_while_adapters_are_loaded(attacked: AttackedServer, kind: str) -> None:
    """Whatever the link leads to when it is looked at: nothing from outside is ever served."""
    roots, outside = attacked.roots, attacked.outside
    folder = roots / f"swapped {kind}".replace(" ", "_")
    if kind == "a folder":
        link, good, bad = folder, roots / "good", outside / "good"
    elif kind == "weights of SoKA":
        shutil.copytree(roots / "good", folder)
        link, good, bad = (place / WEIGHTS_FILE for place in (folder, roots / "good", outside / "good"))
    else:
        shutil.copytree(roots / "lora", folder)
        link, good, bad = (place / WEIGHTS_FILE for place in (folder, roots / "lora", outside / "lora"))
    reference = roots / ("lora" if "LoRA" in kind else "good")
    assert attacked.load("inside", reference)[0] == 200
    expected = attacked.answer("inside")
    attacked.unload("inside")
    loaded = wrong = 0
    with swapping(link, good, bad) as count:
        tries = 0
        while tries < LOADS or count[0] < SWAPS:
            tries += 1
            status, reply = attacked.load("swapped", folder)
            if status == 200:
                loaded += 1
                wrong += attacked.answer("swapped") != pytest.approx(expected, abs=1e-3)
                attacked.unload("swapped")
            else:
                assert status in (400, 404), reply
    assert loaded >= 5, "the link was never where it may be"
    assert wrong == 0, f"{wrong} of {loaded} loads served the adapter from outside"


def test_an_adapter_that_comes_back_is_held_to_the_folder_too(attacked: AttackedServer) -> None:
    """Of the same content, so that nothing but the place is in question: over HTTP, and by name."""
    for name, place in (("leaving", attacked.roots / "leaving"), ("gone", attacked.builds / "gone")):
        shutil.copytree(attacked.roots / "good", place)
        if name == "leaving":
            assert attacked.load(name, place)[0] == 200
        before = attacked.answer(name)
        away = attacked.outside / name
        place.rename(away)
        place.symlink_to(away)
        for other in ("built", "own"):  # they take the memory, so that its files are read again
            attacked.answer(other)
        status, reply = attacked.server.post("/v1/completions", {"model": name, "prompt": PROMPT, "max_tokens": 1})
        assert status >= 400, reply
        place.unlink()
        away.rename(place)
        assert attacked.answer(name) == pytest.approx(before, abs=1e-3)
        attacked.unload(name)


def test_the_operators_own_adapter_may_lie_anywhere(attacked: AttackedServer) -> None:
    assert attacked.answer("own")
    assert attacked.load("mine", attacked.outside / "good")[0] == 400


BAD_NAMES = [
    *("a" * 201, "x" * 1_000_000, "__base__", "_x", ".hidden", "-rf", "a\nb", "a\x1b[31mb", "a\x00", "a b", "a\u202eb"),
    *("/etc", "a//b", "a/", "a/../b", "../a", "a\\b", "a,b", "a=b", 'a"b', "{a}", "é"),
]


def test_names_follow_one_rule(attacked: AttackedServer) -> None:
    good = attacked.roots / "good"
    for name in BAD_NAMES:
        status, reply = attacked.load(name, good)
        assert status == 400, (name[:40], reply)
        message = reply["error"]["message"]
        assert "letters, digits" in message, message
        assert len(message) < 1000
        assert message.isprintable()
    for name in ("math", "org/name", "org/name:v2", "a.b-c_d@1+2", "7b", "a" * 200):
        assert attacked.load(name, good)[0] == 200, name
        assert attacked.answer(name)
        attacked.unload(name)
    assert attacked.load("base", good)[0] == 400


def test_series_end_with_their_adapter(attacked: AttackedServer) -> None:
    attacked.answer("own")
    before = attacked.series()
    assert any('"own"' in line for line in before)
    for at in range(5):
        assert attacked.load(f"brief{at}", attacked.roots / "good")[0] == 200
        attacked.answer(f"brief{at}")
        assert any(f'"brief{at}"' in line for line in attacked.series())
        attacked.unload(f"brief{at}")
    assert attacked.series() == before


def test_names_that_do_not_exist_make_no_series(attacked: AttackedServer) -> None:
    before = attacked.series()
    for name in (*BAD_NAMES, *(f"nobody{at}" for at in range(50))):
        status, _ = attacked.server.post("/v1/completions", {"model": name, "prompt": PROMPT, "max_tokens": 1})
        assert status in (400, 404), name[:40]
        attacked.server.unload(name)
        attacked.load(name, attacked.roots / "nowhere")
    assert attacked.series() == before
    assert "nobody" not in attacked.server.get("/metrics")


FORGED = "\nINFO 01-01 forged by a client\x1b[31m\r"


def test_nobody_writes_lines_of_the_log(attacked: AttackedServer) -> None:
    """By a name, a path, a config or a header; nor does the answer hold what a terminal would obey."""
    tensors = attacked.roots / "tensors"
    shutil.copytree(attacked.roots / "good", tensors)
    values = load_file(tensors / WEIGHTS_FILE)
    save_file({**values, f"x{FORGED}": values.popitem()[1].clone()}, tensors / WEIGHTS_FILE)
    lora = attacked.roots / "lora tensors"
    shutil.copytree(attacked.roots / "lora", lora)
    values = load_file(lora / WEIGHTS_FILE)
    moved = {name.replace("layers.0", f"layers.0{FORGED}"): value for name, value in values.items()}
    save_file(moved, lora / WEIGHTS_FILE)
    config = attacked.roots / "config"
    shutil.copytree(attacked.roots / "good", config)
    text = (config / CONFIG_FILE).read_text().replace("model.layers.1", "model.layers.1\\nINFO 01-01 forged\\u001b[31m")
    (config / CONFIG_FILE).write_text(text)
    odd = attacked.roots / f"odd{FORGED}"
    shutil.copytree(attacked.roots / "good", odd)
    for name, path in (("a", tensors), ("a", lora), ("a", config), ("a", odd), (f"a{FORGED}", config)):
        status, reply = attacked.load(name, path)
        assert status == 400, reply
        assert "\x1b" not in reply["error"]["message"], path
        assert "\nINFO" not in reply["error"]["message"], path
    for name in (f"a{FORGED}", f"../{FORGED}"):
        attacked.server.post("/v1/completions", {"model": name, "prompt": PROMPT, "max_tokens": 1})
    log = attacked.server.log.read_text()
    assert "\x1b[31m" not in log
    assert not [line for line in log.splitlines() if line.startswith("INFO 01-01 forged")]
    assert "01-01 forged by a client" in log  # but what was refused is there to be read
    assert not [line for line in log.splitlines() if "] INFO 01-01" in line]
