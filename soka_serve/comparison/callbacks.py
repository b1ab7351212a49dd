"""What a run of a comparison measures while it trains: loss, gradients, time and memory."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState


@dataclass
class Trace:
    """What a training run showed step by step."""

    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """The trace as a record holds it."""
        return {
            "loss": [round(value, 5) for value in self.loss],
            "grad_norm": [float(f"{value:.5g}") for value in self.grad_norm],
            "step_cpu_s": _mean(self.cpu_s[1:] or self.cpu_s),
            "step_wall_s": _mean(self.wall_s[1:] or self.wall_s),
        }


def _mean(values: Sequence[float]) -> float | None:
    return float(f"{sum(values) / len(values):.5g}") if values else None


class MemoryMeter:
    """Memory that training needs beyond the process as it began; on a GPU, what torch allocates there."""

    def __init__(self) -> None:
        self._began = psutil.Process().memory_info().rss
        self._began_anew = False

    def start_training(self) -> None:
        """Forget what was needed before: losses of the base on long texts take more than a step."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._began_anew = True
        else:
            with suppress(OSError):  # Linux alone has it
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
                self._began_anew = True

    def peak_bytes(self) -> int | None:
        """The most since `start_training`; None where the system does not let a peak begin anew."""
        if not self._began_anew:
            return None
        if torch.cuda.is_available():
            return int(torch.cuda.max_memory_allocated())
        peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self._began  # KiB
        return max(peak, 0)


class Recorder(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Loss, gradient norm before clipping, and time of every step."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._cpu = self._wall = 0.0

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        _synchronise()
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        _synchronise()
        self.trace.cpu_s.append(time.process_time() - self._cpu)
        self.trace.wall_s.append(time.perf_counter() - self._wall)
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            sys.exit(1)  # the suite was killed: nobody waits for this run

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            self.trace.loss.append(float(logs["loss"]))
            self.trace.grad_norm.append(float(logs["grad_norm"]))


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
