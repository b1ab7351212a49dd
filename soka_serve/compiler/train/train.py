"""Stage `tune`: fine-tuning with the transformers Trainer, from factors to a trained adapter.

`work_dir` holds everything of a run: `run.json` (what the run is), `checkpoint-N/` (resume points), `history.jsonl`,
and in the end `adapter/` (`model/` where the whole model is trained) and, written last, `result.json`. A run that was
killed at any point goes on from its newest whole resume point, and on the same CPU and number of processes ends with
the same weights, bit for bit, as one that was not.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from peft import prepare_model_for_kbit_training
from transformers import TrainingArguments, set_seed

from soka_serve.base.cpu import fast_products
from soka_serve.base.model import held_dtype, load_base, quiet_bars
from soka_serve.compiler.methods.method import Trainable
from soka_serve.compiler.train import resume as resume_points
from soka_serve.compiler.train.callbacks import EarlyStopping, EpochOrder, History, Progress, ResumePoints
from soka_serve.compiler.train.precision import computing_dtype
from soka_serve.compiler.train.regularise import check_devices, check_regularisers
from soka_serve.compiler.train.resume import ResumePoint
from soka_serve.compiler.train.run import TrainingRun, TrainResult, fingerprint, finish, prepare_directory
from soka_serve.compiler.train.trainer import SokaTrainer, make_arguments
from soka_serve.data.collate import PadCollator, TokenDataset, has_target
from soka_serve.data.encode import pack_examples
from soka_serve.errors import BuildError, DataError, PlanError
from soka_serve.io.files import disk_errors
from soka_serve.kron.cpu import multiplies_bfloat16

if TYPE_CHECKING:
    from soka_serve.data.encode import EncodedExample, EncodedSet

logger = logging.getLogger(__name__)

# How torch.save says that a file could not be written: it goes through C++ streams, which lose the reason.
_WRITING_FAILED = ("PytorchStreamWriter", "inline_container", "iostream error")


@dataclass(frozen=True)
class TrainingData:
    """Encoded examples; `evaluation` is needed for eval_every. `pad_id` is the token id of the padding.

    `accuracy` says which share of some held-out problems a model answers right; needed for `answered`.
    """

    training: EncodedSet
    evaluation: EncodedSet | None
    pad_id: int
    accuracy: Callable[[Any], float] | None = None


def train(run: TrainingRun, data: TrainingData, *, progress: bool) -> TrainResult:
    """Fine-tune as the manifest says, going on from an interrupted run of the same recipe in the run's directory.

    Args:
        run: what is trained.
        data: the examples.
        progress: show a bar, or plain lines where there is no terminal.

    Every process of an `accelerate launch` calls it; the main one writes.

    Raises:
        SokaError: anything that the user can mend. Ctrl-C passes through and leaves whole resume points only.
    """
    recipe, work_dir = run.manifest.train, run.work_dir
    _check(run, data)
    with disk_errors(work_dir), _torch_errors(work_dir, recipe.batch_size), quiet_bars(), ExitStack() as stack:
        stack.enter_context(fast_products())
        work_dir.mkdir(parents=True, exist_ok=True)
        arguments = make_arguments(
            recipe,
            work_dir,
            name=run.manifest.name or "soka",
            evaluate=recipe.eval_every is not None,
            precision=computing_dtype(run.manifest, run.stored),
        )
        device = arguments.device  # joins the other processes, if there are any
        if recipe.prune is not None and arguments.world_size > 1:
            raise PlanError(
                f"train.prune needs a single process; there are {arguments.world_size}",
                hint="leave [train.prune] out, or launch one process",
            )
        check_devices(recipe.regularise.chosen, arguments.n_gpu)
        state = PartialState()
        if state.is_main_process:
            prepare_directory(run, fingerprint(run, data.training, arguments.world_size, data.evaluation))
        state.wait_for_everyone()
        if (work_dir / "result.json").exists():
            logger.info("%s: training has finished already", work_dir)
            return TrainResult.read(work_dir)
        point = resume_points.newest_point(work_dir)
        if point is None or not point.final:
            set_seed(recipe.seed)  # LoRA's and LoKr's random factors
            model = build_model(run, point.directory if point else None, device)
            if recipe.steps == 0:
                _save_untrained(run, model, state)
            else:
                _fit(run, model, arguments, data, point, stack if progress else None)
        if state.is_main_process:
            finish(run)
        state.wait_for_everyone()
        return TrainResult.read(work_dir)


# ---------------------------------------------------------------------------------------------------------- before


def _check(run: TrainingRun, data: TrainingData) -> None:
    recipe, eval_set = run.manifest.train, data.evaluation
    if run.method.kronecker and not run.factors:
        raise PlanError("nothing to train: no module has factors", hint="every module was given rank 0")
    check_regularisers(recipe.regularise.chosen, run.method, subtracted=bool(run.initial), partly=bool(run.forms))
    if unknown := sorted(set(run.initial) - set(run.factors)):
        raise PlanError(f"initial factors of modules that have none: {', '.join(unknown[:3])}")
    if recipe.eval_every is not None and (eval_set is None or not eval_set.examples):
        raise DataError(
            "train.eval_every is set, but there are no evaluation examples",
            hint="set eval_jsonl, eval_split or eval_frac in [train.data], or take eval_every out",
        )
    if recipe.answered is not None and data.accuracy is None:
        raise PlanError("train.answered is set, and this run has no problems to answer", hint="leave it out")


def make_rows(
    run: TrainingRun, train_set: EncodedSet, eval_set: EncodedSet | None
) -> tuple[TokenDataset, TokenDataset | None]:
    """Datasets of both parts; examples without a token for the loss are left out, loudly."""
    recipe = run.manifest.train
    kept = _with_targets(train_set.examples, "training")
    if not kept:
        raise DataError(
            f"no training examples: {train_set.total} were read, {train_set.dropped} dropped as too long",
            hint='check [train.data], raise train.max_length, or set train.overlong = "truncate"',
        )
    rows = TokenDataset(pack_examples(kept, recipe.max_length)) if recipe.packing else TokenDataset(kept)
    if recipe.eval_every is None or eval_set is None:
        return rows, None
    return rows, TokenDataset(_with_targets(eval_set.examples, "evaluation"))


def _with_targets(examples: Sequence[EncodedExample], what: str) -> list[EncodedExample]:
    kept = [example for example in examples if has_target(example.labels)]
    if len(kept) < len(examples):
        logger.warning(
            "%d %s examples have no token that counts in the loss; left out", len(examples) - len(kept), what
        )
    return kept


def build_model(run: TrainingRun, checkpoint: Path | None, device: torch.device) -> Trainable:
    """The model to train: from the start, or as a checkpoint left it (whose ranks may be smaller)."""
    base = run.manifest.base
    if run.method.whole_model:
        model = load_base(checkpoint or run.model_dir, "float32")
    else:
        model = load_base(run.model_dir, base.dtype, base.quantize, device=device)
        wanted = held_dtype(base.dtype, model.dtype, device)
        if base.quantize == "none" and wanted != model.dtype:
            model = model.to(wanted)
    if device.type == "cpu" and base.quantize == "none":
        _warn_of_slow_half(model.dtype, run.manifest.train.precision)
    model.config.use_cache = False  # a cache would keep packed examples from being told apart
    if base.quantize != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    start = run.start(device)
    return run.method.build(model, start) if checkpoint is None else run.method.restore(model, start, checkpoint)


def _warn_of_slow_half(held: torch.dtype, precision: str) -> None:
    """Say what float32 would save on a CPU that has no fast products in half precision."""
    computed = held if precision == "auto" else getattr(torch, precision)
    asked = {dtype for dtype in (held, computed) if dtype.itemsize < 4}
    if asked - ({torch.bfloat16} if multiplies_bfloat16() else set()):
        logger.warning(
            "half precision on a CPU without fast products for it (bfloat16 has them with AMX, or AVX-512 bfloat16 "
            "of AMD): a step took longer than in float32 where that was measured; "
            'base.dtype = "float32" and train.precision = "float32" hold the base in up to twice the memory'
        )


# ---------------------------------------------------------------------------------------------------------- during


def _fit(
    run: TrainingRun,
    model: Trainable,
    arguments: TrainingArguments,
    data: TrainingData,
    point: ResumePoint | None,
    bar: ExitStack | None,
) -> None:
    """Run the Trainer to its end; the last checkpoint in `work_dir` is then the final one."""
    recipe, facts = run.manifest.train, None if point is None else point.facts
    rows, eval_rows = make_rows(run, data.training, data.evaluation)
    callbacks: list[Any] = [EpochOrder(), History(run.work_dir / "history.jsonl")]
    if recipe.early_stopping is not None:
        callbacks.append(EarlyStopping(recipe.early_stopping))
    callbacks.append(
        ResumePoints(run.work_dir, lambda: trainer.facts(), elapsed_s=facts["elapsed_s"] if facts else 0.0),
    )
    if bar is not None:
        callbacks.append(Progress(bar))
    trainer = SokaTrainer(
        run,
        model,
        arguments,
        facts=facts,
        accuracy=data.accuracy if recipe.answered is not None else None,
        callbacks=callbacks,
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=PadCollator(data.pad_id, multiple_of=1 if arguments.use_cpu else 8),
    )
    if point is not None:
        logger.info("going on from step %d", point.step)
    with warnings.catch_warnings():
        # torch renames the switch that keeps DDP from sending the constant initial factors around at every step.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        trainer.train(resume_from_checkpoint=str(point.directory) if point else None)
    if not arguments.use_cpu:
        trainer.accelerator.free_memory()


@contextmanager
def _torch_errors(work_dir: Path, batch_size: int) -> Iterator[None]:
    """Failures that torch reports in words of its own."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise BuildError(
            "out of GPU memory while training",
            hint=f"lower train.batch_size (now {batch_size}) and raise train.accumulate, set "
            'train.gradient_checkpointing = true, or base.quantize = "4bit"',
        ) from error
    except RuntimeError as error:
        if not any(word in str(error) for word in _WRITING_FAILED):
            raise
        raise BuildError(
            f"cannot write a resume point in {work_dir}: {str(error).splitlines()[0]}",
            hint="the disk, a quota or a limit on file sizes (ulimit -f) may have been reached: free some space",
        ) from error


def _save_untrained(run: TrainingRun, model: Trainable, state: PartialState) -> None:
    """A checkpoint of step 0, final: the initialisation itself."""
    if not state.is_main_process:
        return
    directory = resume_points.checkpoint_directory(run.work_dir, 0)
    model.save_pretrained(str(directory))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    facts = {"elapsed_s": 0.0, "trainable_parameters": trainable, "max_steps": 0}
    resume_points.mark_complete(directory, step=0, final=True, facts=facts)
