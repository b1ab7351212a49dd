"""A killed run goes on, and ends with the same weights, bit for bit, as one that was not killed."""

from __future__ import annotations

import json
import random
import signal
import time
from contextlib import suppress
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from soka_serve.compiler.history import read_history
from soka_serve.compiler.train.resume import mark_complete, newest_point, remove_incomplete
from soka_serve.compiler.train.run import TrainResult
from tests.support.preloaded import Program, start
from tests.support.training import make_base

STEPS = 16
OPTIONS: dict[str, Any] = {"steps": STEPS, "save_every": 4, "log_every": 2}
PRUNE = {"threshold": 0.3, "every": 2, "patience": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("kill") / "base")


def begin(base: Path, work_dir: Path, kill: str, options: dict[str, Any]) -> Program:
    """Start training in a process of its own."""
    return start("soka", ["tests.support.train_runs", base, work_dir, kill, json.dumps(options)], cwd=base.parent)


def run(base: Path, work_dir: Path, kill: str, options: dict[str, Any]) -> int:
    """Train in a process of its own; its exit code."""
    return begin(base, work_dir, kill, options).wait(300)


def check_equal(left: Path, right: Path, *, history: bool = True) -> None:
    """Same tensors, bit for bit, same result, same history."""
    first, second = TrainResult.read(left), TrainResult.read(right)
    for file in sorted(first.directory.glob("*.safetensors")):
        tensors, others = load_file(file), load_file(second.directory / file.name)
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    for name in ("steps", "steps_run", "trainable_parameters", "pruned", "stopped_early"):
        assert getattr(first, name) == getattr(second, name)
    assert not list(right.glob("checkpoint-*"))
    if history:
        assert read_history(first.history) == read_history(second.history)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["soka", "lora", "pissa", "lokr", "full"])
def test_killed_at_every_kind_of_point(base: Path, tmp_path: Path, method: str) -> None:
    """One run that is killed at one point after another, each in a later stage than the last."""
    options = OPTIONS | {"method": method}
    if method == "soka":
        options |= {"prune": PRUNE, "rank": 3}
    assert run(base, tmp_path / "whole", "", options) == 0
    kills = ["after-step:2", "optimizer:4", "marker:4", "after-step:7", "history:8", "truncate", "rotation:4",
             "marker:16", "export", "result", "cleanup"]  # fmt: skip
    if method != "soka":
        kills = ["after-step:7", "optimizer:8", "after-step:13", "result"]
    if method == "full":
        kills = ["after-step:7", "rotation:4", "result"]
    for kill in kills:
        assert run(base, tmp_path / "killed", kill, options) == -signal.SIGKILL, kill
    assert run(base, tmp_path / "killed", "", options) == 0
    check_equal(tmp_path / "whole", tmp_path / "killed")
    if method == "soka":
        assert TrainResult.read(tmp_path / "killed").pruned  # else the ranks never differed


@pytest.mark.slow
def test_killed_with_early_stopping(base: Path, tmp_path: Path) -> None:
    """The count of evaluations without improvement and the best one survive; pruning goes on in between."""
    options = OPTIONS | {
        "steps": 60, "learning_rate": 2.0, "eval_every": 2, "early_stopping": 3, "schedule": "constant",
        "save_every": 5, "log_every": 1, "rank": 3, "prune": PRUNE,
    }  # fmt: skip
    assert run(base, tmp_path / "whole", "", options) == 0
    end = TrainResult.read(tmp_path / "whole")
    assert end.stopped_early
    for kill in (f"after-step:{end.steps + 1}", f"marker:{end.steps_run}", "export"):
        assert run(base, tmp_path / "killed", kill, options) == -signal.SIGKILL, kill
    assert run(base, tmp_path / "killed", "", options) == 0
    check_equal(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_killed_at_random_times(base: Path, tmp_path: Path) -> None:
    """From outside, without any hook: whatever it was doing."""
    options = OPTIONS | {"steps": 60, "save_every": 2, "rank": 3, "prune": PRUNE}
    started = time.monotonic()
    assert run(base, tmp_path / "whole", "", options) == 0
    duration = time.monotonic() - started
    rng = random.Random(0)
    kills = 0
    for _ in range(10):
        process = begin(base, tmp_path / "killed", "", options)
        with suppress(TimeoutExpired):
            process.wait(rng.uniform(0.02, 0.2) * duration)
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills >= 2
    assert run(base, tmp_path / "killed", "", options) == 0
    check_equal(tmp_path / "whole", tmp_path / "killed")


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        directory = tmp_path / f"checkpoint-{step}"
        directory.mkdir()
        (directory / "weights").write_bytes(b"x" * step)
        if step < 8:
            mark_complete(directory, step=step, final=False, facts={"note": step})
    (tmp_path / "checkpoint-6" / "weights").write_bytes(b"x")  # cut short
    point = newest_point(tmp_path)
    assert point is not None
    assert (point.step, point.final, point.facts) == (4, False, {"note": 4})
    (tmp_path / "checkpoint-4" / "weights").unlink()  # half removed
    assert [p.name for p in remove_incomplete(tmp_path)] == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]
