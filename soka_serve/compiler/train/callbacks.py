"""What happens around a training step: history, resume points, pruning, early stopping, progress."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState

from soka_serve.compiler.history import append_history, truncate_history
from soka_serve.compiler.methods.adapter_files import ADAPTER
from soka_serve.compiler.train.resume import checkpoint_directory, mark_complete
from soka_serve.io.progress import track
from soka_serve.kron import Factors
from soka_serve.kron.factors import energy_by_term
from soka_serve.manifest.schema import Prune
from soka_serve.peft import drop_terms, soka_layers, term_energies
from soka_serve.regularisers import REGULARISERS

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------------- spectra


@dataclass(frozen=True)
class Spectrum:
    """The terms of one module as they are now.

    `sigma` are the Frobenius norms of the trained terms, sigma ||L|| ||R||; `energy` is the squared Frobenius norm of
    what each term adds to the base: of sigma L (x) R, minus the initial term where there is one (so it is 0 at step 0).
    """

    sigma: tuple[float, ...]
    energy: tuple[float, ...]

    @property
    def rank(self) -> int:
        """Number of terms."""
        return len(self.sigma)

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the energy shares, between 1 and the rank; 0 when there is no energy.

        Roy and Vetterli 2007, "The effective rank"; of terms here, not of singular values.

        >>> Spectrum((2.0, 2.0), (4.0, 4.0)).effective_rank
        2.0
        >>> Spectrum((2.0, 0.0), (4.0, 0.0)).effective_rank
        1.0
        """
        total = math.fsum(self.energy)
        if not (math.isfinite(total) and total > 0):
            return 0.0
        shares = [e / total for e in self.energy if e > 0]
        return math.exp(-math.fsum(s * math.log(s) for s in shares))


def read_spectra(model: nn.Module) -> dict[str, Spectrum]:
    """The spectrum of every adapted module; empty for a model without SoKA layers. Collective under FSDP.

    `soka_serve.peft.term_energies` gives the same energies; this one reads sharded parameters too.
    """
    spectra = {}
    for name, layer in soka_layers(model, ADAPTER).items():
        theta, initial = _whole(layer.theta(ADAPTER)), layer.began(ADAPTER)
        energy = energy_by_term(theta, None if initial is None else _whole(initial))
        values = torch.stack([energy_by_term(theta).sqrt(), energy]).tolist()
        spectra[name] = Spectrum(tuple(values[0]), tuple(values[1]))
    return spectra


def _whole(factors: Factors) -> Factors:
    """Detached float64 factors; of sharded parameters the full ones."""
    tensors = (t.detach() for t in (factors.left, factors.right, factors.sigma))
    return Factors(*((t.full_tensor() if hasattr(t, "full_tensor") else t).double() for t in tensors))


class History(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Append one JSON line per log to `history.jsonl`, in the main process.

    A line has `step` and `epoch`, and either `loss` (the mean since the last line), `grad_norm` (before clipping),
    `learning_rate` (without the factors' multipliers), the value of each regulariser by its name (the mean since the
    last line) and, for SoKA, `modules`: per module `rank`, `sigma` (list) and `effective_rank`; or `eval_loss` and,
    with `answered`, `eval_accuracy`. On resuming, lines after the resumed step are taken out, since they are written
    again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            truncate_history(self.path, state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: Mapping[str, Any] = kwargs["logs"]
        line: dict[str, Any] = {"step": state.global_step, "epoch": state.epoch}
        if "loss" in logs:
            line.update({key: logs.get(key) for key in ("loss", "grad_norm", "learning_rate")})
            line.update({key: logs[key] for key in REGULARISERS if key in logs})
            spectra = read_spectra(kwargs["model"])
            if spectra:
                line["modules"] = {
                    name: {"rank": s.rank, "sigma": s.sigma, "effective_rank": s.effective_rank}
                    for name, s in spectra.items()
                }
        elif "eval_loss" in logs:
            line.update({key: logs[key] for key in ("eval_loss", "eval_accuracy") if key in logs})
        else:
            return
        if state.is_world_process_zero:
            append_history(self.path, line)


def tracker_metrics(spectra: Mapping[str, Spectrum]) -> dict[str, float]:
    """What goes to `report_to` beside the loss: effective rank, rank and every sigma per module, and the mean."""
    if not spectra:
        return {}
    metrics = {"effective_rank": math.fsum(s.effective_rank for s in spectra.values()) / len(spectra)}
    for name, spectrum in spectra.items():
        metrics[f"rank/{name}"] = spectrum.rank
        metrics[f"effective_rank/{name}"] = spectrum.effective_rank
        metrics.update({f"sigma/{name}/{k}": value for k, value in enumerate(spectrum.sigma)})
    return metrics


# --------------------------------------------------------------------------------------------------------- pruning


class Pruning(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Drop terms whose share of their module's energy stays below a threshold.

    Every `every` steps (not after the last one) a term with a share below `threshold` fails the check; one that fails
    `patience` checks in a row is dropped with its optimiser state, weakest first, as long as `min` terms remain. A
    dropped term takes its initial counterpart with it: what it had learned is lost, what it started from is not
    subtracted any more. The others go on at the rates of a module with as many terms as are left.
    """

    def __init__(self, rules: Prune) -> None:
        self.rules = rules
        self.failures: dict[str, list[int]] = {}
        self.dropped: dict[str, int] = {}

    def facts(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"failures": self.failures, "dropped": self.dropped}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Take over the counters of an interrupted run."""
        self.failures = {name: list(counts) for name, counts in facts["failures"].items()}
        self.dropped = dict(facts["dropped"])

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.rules.every or state.global_step >= state.max_steps:
            return
        model = kwargs["model"]
        keep = {}
        for name, energies in term_energies(model, ADAPTER).items():
            kept = self.check(name, [float(e) for e in energies])
            if len(kept) < len(energies):
                keep[name] = kept
                self.dropped[name] = self.dropped.get(name, 0) + len(energies) - len(kept)
        if keep:
            logger.info("step %d: pruning terms of %d modules", state.global_step, len(keep))
            optimizer = _inner(kwargs["optimizer"], "optimizer")
            scheduler = _inner(kwargs["lr_scheduler"], "scheduler")
            drop_terms(model, keep, optimizer=optimizer, adapter_name=ADAPTER, scheduler=scheduler)

    def check(self, name: str, energies: Sequence[float]) -> list[int]:
        """Count one check of a module; the indices of the terms that stay."""
        total = math.fsum(energies)
        failures = self.failures.get(name, [0] * len(energies))
        # A module without any energy (a zero start) has nothing to compare.
        shares = [e / total if total > 0 else 1.0 for e in energies]
        failures = [f + 1 if s < self.rules.threshold else 0 for f, s in zip(failures, shares, strict=True)]
        weak = [k for k, f in enumerate(failures) if f >= self.rules.patience]
        weak.sort(key=lambda k: energies[k])
        gone = set(weak[: max(len(energies) - self.rules.min, 0)])
        kept = [k for k in range(len(energies)) if k not in gone]
        self.failures[name] = [failures[k] for k in kept]
        return kept


def _inner(wrapper: Any, kind: str) -> Any:
    """Torch's optimizer or scheduler inside accelerate's wrapper of that kind."""
    return getattr(wrapper, kind, wrapper)


# ---------------------------------------------------------------------------------------------- order of examples


class EpochOrder(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Tell the sampler its epoch.

    The data loader tells it too, but for one that skips the batches of before an interruption where several processes
    train: accelerate then wraps the sampler once more than it unwraps it.
    """

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        batches = kwargs["train_dataloader"].batch_sampler
        while hasattr(batches, "batch_sampler"):
            batches = batches.batch_sampler
        if hasattr(batches.sampler, "set_epoch"):
            batches.sampler.set_epoch(int(state.epoch or 0))


# --------------------------------------------------------------------------------------------------- resume points


class ResumePoints(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """After a checkpoint's files are written, declare it whole; collective, the main process writes.

    Args:
        work_dir: where the Trainer writes its checkpoints.
        facts: what else to note with a checkpoint.
        elapsed_s: seconds of training before this call, from an interrupted run.
    """

    def __init__(self, work_dir: Path, facts: Callable[[], Mapping[str, Any]], elapsed_s: float = 0.0) -> None:
        self.work_dir = work_dir
        self.facts = facts
        self.elapsed_s = elapsed_s
        self.started = time.monotonic()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.started = time.monotonic()

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()  # every process has its random state in the directory
        if not state.is_world_process_zero:
            return
        facts = {
            **self.facts(),
            "elapsed_s": self.elapsed_s + time.monotonic() - self.started,
            "trainable_parameters": sum(p.numel() for p in kwargs["model"].parameters() if p.requires_grad),
            "max_steps": state.max_steps,
            "best_step": state.best_global_step,
            "best_metric": state.best_metric,
        }
        directory = checkpoint_directory(self.work_dir, state.global_step)
        mark_complete(directory, step=state.global_step, final=control.should_training_stop, facts=facts)


class EarlyStopping(EarlyStoppingCallback):  # type: ignore[misc, unused-ignore]
    """Stop when evaluations have not improved `early_stopping_patience` times in a row, by loss or by accuracy.

    Every evaluation leaves a resume point, so that the best one is there in the end, whatever `save_every` is.
    """

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Nothing: the parent's check wants load_best_model_at_end, which cannot follow pruned ranks."""

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any) -> None:
        super().on_evaluate(args, state, control, metrics, **kwargs)
        control.should_save = True


# ------------------------------------------------------------------------------------------------------- progress


class Progress(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """One bar (or now and then a plain line) for the whole training, with the last logged loss."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.detail = ""
        self.advance: Callable[..., None] = lambda detail="", by=1: None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.advance = self.stack.enter_context(
            track(state.max_steps, "tune", unit="step", enabled=state.is_world_process_zero)
        )
        if state.global_step:
            self.advance("resumed", state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for key, what in (("loss", "loss"), ("eval_loss", "eval loss")):
            if key in kwargs["logs"]:
                self.detail = f"{what} {kwargs['logs'][key]:.4f}"

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.advance(self.detail)
