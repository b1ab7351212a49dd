"""The work directory of a training run: what it belongs to, what it can go on from, and what is kept in the end."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from soka_serve.compiler.history import read_history
from soka_serve.compiler.keys import keyed_recipe
from soka_serve.compiler.methods import Method, StartingPoint
from soka_serve.compiler.train import resume as resume_points
from soka_serve.errors import BuildError, name_some
from soka_serve.io.files import replace_directory, write_text_atomic
from soka_serve.manifest.schema import Manifest

if TYPE_CHECKING:
    import torch

    from soka_serve.data.encode import EncodedSet
    from soka_serve.kron import Factors
    from soka_serve.trained import Form

logger = logging.getLogger(__name__)

_FOLDERS = ("adapter", "model", "initial")  # of a run, beside its checkpoints


@dataclass(frozen=True)
class TrainingRun:
    """One training run: what is trained, how, and where it writes.

    Args:
        model_dir: the base checkpoint.
        stored: the dtype of its weights, in torch's spelling ('bfloat16').
        manifest: [base] and [train] are read, but for the method's name.
        method: what is trained.
        targets: full names of the modules to adapt; SoKA adapts those of `factors`.
        work_dir: directory of everything that the run writes, see `soka_serve.compiler.train.train`.
        factors: theta at the start by module name, for SoKA.
        initial: the modules whose starting factors are subtracted (theta - theta0), for SoKA.
        cut: terms that are taken off modules' weights and stay off, by name, for SoKA.
        forms: what of a module is trained by its name, for SoKA; of others everything.
        batches: makes training batches on the run's device, for methods that read some before they start.
        quantize: of a base in bits, where the adapter is right on that alone, for SoKA.
    """

    model_dir: Path
    manifest: Manifest
    method: Method
    targets: Sequence[str]
    work_dir: Path
    stored: str = "float32"
    factors: Mapping[str, Factors] = field(default_factory=dict)
    initial: Collection[str] = frozenset()
    cut: Mapping[str, Factors] = field(default_factory=dict)
    forms: Mapping[str, Form] = field(default_factory=dict)
    batches: Callable[[], Sequence[Mapping[str, torch.Tensor]]] = tuple
    quantize: str | None = None

    @property
    def initial_dir(self) -> Path:
        """Where a method that rewrites the base keeps its factors of step 0."""
        return self.work_dir / "initial"

    def start(self, device: torch.device) -> StartingPoint:
        """What the method builds its model from."""
        train = self.manifest.train
        return StartingPoint(
            targets=self.targets,
            rank=train.method_rank,
            scale=train.method_scale,
            base_name=self.manifest.base.hub or str(self.model_dir.resolve()),
            device=device,
            steps=train.steps,
            initial_dir=self.initial_dir,
            batches=self.batches,
            factors=self.factors,
            initial=self.initial,
            cut=self.cut,
            forms=self.forms,
            quantize=self.quantize,
        )


@dataclass(frozen=True)
class TrainResult:
    """What a training run made.

    Args:
        method: the method's name.
        directory: the trained adapter as PEFT loads it (theta and, where there are any, the initial factors; PiSSA as
            a plain LoRA), or the whole model.
        history: JSON lines, see `callbacks.History`.
        steps: optimiser steps of the weights that were kept; with early stopping the best evaluation's.
        steps_run: optimiser steps in all.
        steps_planned: optimiser steps that were asked for.
        final_loss: mean training loss of the last logged steps; None for 0 steps.
        eval_loss: evaluation loss of the weights that were kept; None where nothing was evaluated.
        trainable_parameters: trained values, after pruning.
        seconds: training time, without what was lost to kills.
        pruned: terms dropped, by module.
        stopped_early: early stopping ended the run.
    """

    method: str
    directory: Path
    history: Path
    steps: int
    steps_run: int
    steps_planned: int
    final_loss: float | None
    eval_loss: float | None
    trainable_parameters: int
    seconds: float
    pruned: dict[str, int]
    stopped_early: bool

    @classmethod
    def read(cls, work_dir: Path) -> TrainResult:
        """The result of a finished run.

        Raises:
            BuildError: there is none, or its files are gone.
        """
        file = work_dir / "result.json"
        try:
            values = json.loads(file.read_text())
            result = cls(directory=work_dir / values.pop("directory"), history=work_dir / "history.jsonl", **values)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BuildError(f"{file}: no finished training run: {error}", hint="train again") from error
        if not result.directory.is_dir():
            raise BuildError(f"{result.directory}: the trained weights are gone", hint="train again")
        return result

    def write(self, work_dir: Path) -> None:
        """Write `result.json`, which `read` reads."""
        values = asdict(self)
        del values["history"]
        write_text_atomic(work_dir / "result.json", json.dumps(values | {"directory": self.directory.name}, indent=1))


def fingerprint(run: TrainingRun, train_set: EncodedSet, processes: int, evaluation: EncodedSet | None = None) -> str:
    """What a resume point belongs to: recipe, starting factors, examples, number of processes, how the base is held.

    Where the base lies does not count; that its weights are the same, the work directory's name says. The evaluation
    set counts where it is looked at.
    """
    manifest = run.manifest
    digest = hashlib.sha256()
    recipe = {
        "base": manifest.base.model_dump(mode="json", include={"dtype", "quantize"}),
        "train": keyed_recipe(manifest, run.method, run.stored),
        "targets": list(run.targets),
        "initial": sorted(run.initial),
        "examples": len(train_set.examples),
        "processes": processes,
    }
    if run.forms:
        recipe["forms"] = {name: dict(form.choices) for name, form in sorted(run.forms.items())}
    digest.update(json.dumps(recipe, sort_keys=True).encode())
    looked_at = evaluation.examples if evaluation is not None and manifest.train.eval_every is not None else []
    for example in (*train_set.examples, *looked_at):  # a chat template may have rendered the day's date
        for numbers in (example.input_ids, example.labels):
            digest.update(array("q", [len(numbers), *numbers]).tobytes())
    for name, f in (*sorted(run.factors.items()), *sorted(run.cut.items())):
        digest.update(name.encode())
        for tensor in (f.left, f.right, f.sigma):
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def prepare_directory(run: TrainingRun, identity: str) -> None:
    """Leave in the work directory what this run can go on from, and nothing else of ours."""
    file = run.work_dir / "run.json"
    try:
        found = json.loads(file.read_text())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None
        _refuse_strangers(run.work_dir)
    if found != identity:
        if file.exists():
            logger.warning("%s holds a run of another recipe; starting afresh", run.work_dir)
        (run.work_dir / "result.json").unlink(missing_ok=True)
        for name in _FOLDERS:
            shutil.rmtree(run.work_dir / name, ignore_errors=True)
        resume_points.remove_all(run.work_dir)
        (run.work_dir / "history.jsonl").unlink(missing_ok=True)
        write_text_atomic(file, json.dumps({"fingerprint": identity}))
    if (run.work_dir / "result.json").exists():
        resume_points.remove_all(run.work_dir)  # a kill may have come between the result and this
    resume_points.remove_incomplete(run.work_dir)


def _refuse_strangers(work_dir: Path) -> None:
    """Raise BuildError where files that a run would remove are there, and no run.json says that a run wrote them."""
    names = (*_FOLDERS, "result.json", "history.jsonl")
    there = [path.name for path in resume_points.checkpoints(work_dir)]
    there += [name for name in names if (work_dir / name).exists()]
    if there:
        raise BuildError(
            f"{work_dir}: holds {name_some(there)}, and no run.json of a training run that wrote them",
            hint="give a work_dir of its own, or move them away",
        )


def finish(run: TrainingRun) -> None:
    """Copy the weights that are kept out of their checkpoint, write the result, and remove the checkpoints."""
    last = resume_points.newest_point(run.work_dir)
    if last is None or not last.final:
        raise BuildError(f"{run.work_dir}: training ended without a final checkpoint", hint="report this as a bug")
    kept = last
    best_step = last.facts.get("best_step")
    if run.manifest.train.early_stopping is not None and best_step and best_step != last.step:
        best = resume_points.read_point(resume_points.checkpoint_directory(run.work_dir, best_step))
        if best is None:
            raise BuildError(f"{run.work_dir}: the best checkpoint (step {best_step}) is gone", hint="train again")
        kept = best
    directory = run.work_dir / ("model" if run.method.whole_model else "adapter")
    with replace_directory(directory) as new:
        run.method.collect(kept.directory, new, initial_dir=run.initial_dir, base_dir=run.model_dir)
    history = read_history(run.work_dir / "history.jsonl")
    losses = [line["loss"] for line in history if "loss" in line]
    evaluated = {line["step"]: line["eval_loss"] for line in history if "eval_loss" in line}
    prune = kept.facts.get("prune", {})
    TrainResult(
        method=run.method.name,
        directory=directory,
        history=run.work_dir / "history.jsonl",
        steps=kept.step,
        steps_run=last.step,
        steps_planned=int(last.facts["max_steps"]),
        final_loss=losses[-1] if losses else None,
        eval_loss=evaluated.get(kept.step),
        trainable_parameters=int(kept.facts["trainable_parameters"]),
        seconds=float(last.facts["elapsed_s"]),
        pruned=dict(prune.get("dropped", {})),
        stopped_early=last.step < int(last.facts["max_steps"]),
    ).write(run.work_dir)
    resume_points.remove_all(run.work_dir)
