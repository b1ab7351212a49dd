"""A training run that kills itself: BASE WORK_DIR WHERE:STEP OPTIONS (JSON); an empty WHERE:STEP kills nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from soka_serve.compiler.methods import Method
from soka_serve.compiler.train import callbacks, resume
from soka_serve.compiler.train import run as train_run
from tests.support.training import make_examples, run_training


def main(base: Path, work_dir: Path, kill: str, options: dict[str, Any]) -> None:
    """Train; with `kill` = "WHERE:STEP", SIGKILL this process there."""
    if kill:
        where, _, step = kill.partition(":")
        KILLS[where](int(step or 0))
    if "eval_every" in options:
        options = options | {"eval_set": make_examples(16, seed=5)}
    run_training(base, work_dir, **options)


def _die(*_: Any, **__: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def _after_step(step: int) -> None:
    original = callbacks.History.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        if state.global_step == step:
            _die()

    callbacks.History.on_step_end = on_step_end  # type: ignore[method-assign]


def _while_writing_the_optimizer(step: int) -> None:
    """The adapter is there, optimizer.pt is cut short."""
    original = torch.save

    def save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        original(value, path, *args, **kwargs)
        if str(path).endswith("optimizer.pt") and f"checkpoint-{step}/" in str(path):
            os.truncate(path, Path(path).stat().st_size // 2)
            _die()

    torch.save = save


def _before_the_marker(step: int) -> None:
    original = callbacks.mark_complete

    def mark(directory: Path, **kwargs: Any) -> None:
        if kwargs["step"] == step:
            _die()
        original(directory, **kwargs)

    callbacks.mark_complete = mark


def _while_removing_an_old_checkpoint(step: int) -> None:
    """Some of its files are gone, the marker is still there."""
    original = shutil.rmtree

    def rmtree(path: Any, *args: Any, **kwargs: Any) -> None:
        if str(path).endswith(f"checkpoint-{step}"):
            (Path(path) / "optimizer.pt").unlink()
            _die()
        original(path, *args, **kwargs)

    shutil.rmtree = rmtree  # type: ignore[assignment]


def _while_writing_history(step: int) -> None:
    """Half a line is in the file."""
    original = callbacks.append_history

    def append(path: Path, line: dict[str, Any]) -> None:
        if line["step"] == step:
            with path.open("a") as file:
                file.write(json.dumps(line)[:40])
            _die()
        original(path, line)

    callbacks.append_history = append


def _while_truncating_history(_: int) -> None:
    """The lines after the resumed step are being taken out."""
    original = Path.open

    def open_(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = original(self, mode, *args, **kwargs)
        if "w" in mode and "history" in self.name:
            _die()
        return file

    Path.open = open_  # type: ignore[method-assign, assignment]


def _while_exporting(_: int) -> None:
    """The adapter's config is copied, its tensors are not."""

    def collect(self: Method, checkpoint: Path, out: Path, **folders: Path) -> None:
        shutil.copy2(checkpoint / "adapter_config.json", out)
        _die()

    Method.collect = collect  # type: ignore[method-assign, assignment]


def _before_the_result(_: int) -> None:
    train_run.TrainResult.write = _die  # type: ignore[method-assign, assignment]


def _after_the_result(_: int) -> None:
    resume.remove_all = _die


KILLS: dict[str, Callable[[int], None]] = {
    "after-step": _after_step,
    "optimizer": _while_writing_the_optimizer,
    "history": _while_writing_history,
    "truncate": _while_truncating_history,
    "marker": _before_the_marker,
    "rotation": _while_removing_an_old_checkpoint,
    "export": _while_exporting,
    "result": _before_the_result,
    "cleanup": _after_the_result,
}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
