"""The stages of a build that make things: encode, init, tune, export, merge, check, measure.

Each looks whether its result is there already, runs its function if not, and hands the result on.
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soka_serve.base.served_tokenizer import check_reading, reading_note
from soka_serve.base.target_modules import budget_groups
from soka_serve.compiler.check import SAMPLES, Questions, QuickCheck, answer
from soka_serve.compiler.methods import DenseOutput
from soka_serve.data.encode import encode_examples
from soka_serve.data.examples import DataReader
from soka_serve.data.mixture import mix_encoded, naming
from soka_serve.io.file_names import CONFIG_FILE, LOCK_FILE
from soka_serve.io.files import replace_directory, scratch_directory, write_text_atomic
from soka_serve.io.lockfile import read_lock
from soka_serve.io.workspace import link_tree

if TYPE_CHECKING:
    from torch import Tensor

    from soka_serve.base.target_modules import TargetModule
    from soka_serve.base.tokenizer import TextTokenizer
    from soka_serve.compiler.context import Context
    from soka_serve.compiler.init.result import Initialisation
    from soka_serve.compiler.quiz import Quiz
    from soka_serve.compiler.train.run import TrainResult
    from soka_serve.data.encode import EncodedSet
    from soka_serve.data.examples import Example

logger = logging.getLogger(__name__)

MEASURED_FILE = "measured.json"


def encode(context: Context, split_seed: int | None = None) -> tuple[EncodedSet, EncodedSet | None]:
    """Training and evaluation examples as tokens (the latter None when nothing evaluates the loss).

    `split_seed` chooses what `eval_frac` holds out; default: the seed of the run.
    """
    train = context.loaded.manifest.train
    tokenizer, folder = context.base.tokenizer, context.base.tokenizer_folder
    seed = train.seed if split_seed is None else split_seed
    readers = [DataReader(data, context.loaded.directory, seed, tokenizer) for data in train.datasets]
    sets: list[EncodedSet] = []
    for number, reader in enumerate(readers):
        with naming(number, len(readers)):
            examples = reader.examples("train")
            _check_reading(context, tokenizer, examples)
            sets.append(encode_examples(examples, tokenizer, train))
    training = mix_encoded(sets, train.weights, train.seed)
    if training.dropped or training.truncated:
        text = "%d of %d examples are longer than max_length = %d tokens: %d dropped, %d truncated"
        over = training.dropped, training.truncated
        logger.warning(text, sum(over), training.total, train.max_length, *over)
    if train.eval_every is None:
        return training, None
    held_out: list[Example] = []
    for number, reader in enumerate(readers):
        with naming(number, len(readers)):
            held_out += reader.examples("eval")
    check_reading(tokenizer, held_out, folder)
    return training, encode_examples(held_out, tokenizer, train)


def _check_reading(context: Context, tokenizer: TextTokenizer, examples: Sequence[Example]) -> None:
    differing = check_reading(tokenizer, examples, context.base.tokenizer_folder)
    if differing and context.processes.is_main:
        logger.info(reading_note(tokenizer.settings.reader, differing, len(examples)))


def init_stage(context: Context, training: EncodedSet) -> Initialisation:
    """Factors at step 0: from the cache, or decomposed now (by all processes together)."""
    from soka_serve.base.cpu import fast_products
    from soka_serve.compiler.artefact import gpu
    from soka_serve.compiler.init.initialise import InitRun
    from soka_serve.compiler.init.result import Initialisation

    key = context.keys["init"]
    directory = context.workspace.stage("init", key)
    if context.workspace.is_cached("init", key):
        logger.info("init: unchanged, taken from the cache")
        context.timings_s["init"] = _seconds_of(directory)
        return Initialisation.read(directory)
    train = context.loaded.manifest.train
    idle = all(t.rule.start.drawn and t.rule.rank.policy == "fixed" and t.shape is not None for t in context.targets)
    what = (
        f"drawing the factors of {len(context.targets)} modules"
        if idle
        else f"decomposing {len(context.targets)} weights"
    )
    with context.stage("init", what), fast_products():
        device = gpu()
        groups = budget_groups(context.loaded.manifest, context.targets)
        with scratch_directory(directory) as scratch:
            run = InitRun(
                context.targets,
                context.base,
                finetuned=context.finetuned,
                adapters={source: adapter.read() for source, adapter in context.adapters.items()},
                statistics=lambda targets: _statistics(context, training, targets, scratch),
                budgets={t.module.name: i for i, group in groups.items() for t in group},
                held=_holder(context),
                seed=train.seed,
                device=device,
                processes=context.processes,
                scratch=scratch,
                progress=context.progress,
            )
            started = run.initialise()
        if context.processes.is_main:
            with replace_directory(directory) as new:
                started.write(new)
                _mark_done(new, context.seconds_so_far())
        context.processes.wait()
    return started


def _holder(context: Context) -> Callable[[Tensor], Tensor] | None:
    """Makes of a weight what the quantised base computes with; None where no start asks for that."""
    if not any(target.rule.start.on_quantised for target in context.targets):
        return None
    from soka_serve.base.held import held_weight

    table = context.loaded.manifest.base
    return partial(held_weight, quantize=table.quantize, dtype=table.dtype)


def _statistics(
    context: Context, training: EncodedSet, targets: Sequence[TargetModule], scratch: Path
) -> Iterable[Any]:
    """Gradients and input moments of the base over the first batches of a seeded shuffle of the training data."""
    import torch

    from soka_serve.compiler.artefact import first_batches, gpu
    from soka_serve.compiler.init.placement import load_layered
    from soka_serve.compiler.init.probe import batches_needed, gather

    device = gpu() or torch.device("cpu")
    model, placement = load_layered(context.base, context.loaded.manifest.base.dtype, device)
    batches = first_batches(context, training, batches_needed(targets), device)
    yield from gather(model, batches, targets, scratch, placement)
    del model, placement
    gc.collect()


def tune_stage(
    context: Context,
    encoded: tuple[EncodedSet, EncodedSet | None],
    start: Initialisation | None,
    quiz: Quiz | None,
) -> TrainResult:
    """The trained weights: from the cache, or trained now, going on from the last resume point."""
    from soka_serve.compiler.train.run import TrainingRun, TrainResult
    from soka_serve.compiler.train.train import TrainingData, train

    key = context.keys["tune"]
    directory = context.workspace.stage("tune", key)
    if context.workspace.is_cached("tune", key):
        logger.info("tune: unchanged, taken from the cache")
        context.timings_s["tune"] = _seconds_of(directory)
        return TrainResult.read(directory)
    manifest = context.loaded.manifest
    with context.stage("tune", f"training ({manifest.train.method})"):
        directory.mkdir(parents=True, exist_ok=True)
        run = TrainingRun(
            model_dir=context.base.directory,
            manifest=manifest,
            method=context.method,
            targets=[t.module.name for t in context.targets],
            work_dir=directory,
            stored=context.base.layout.size.dtype,
            factors=start.factors if start else {},
            initial=start.initial_modules if start else frozenset(),
            cut=start.cut if start else {},
            forms=start.forms if start else {},
            quantize=context.quantize,
        )
        data = TrainingData(*encoded, context.base.tokenizer.pad_id, quiz.accuracy if quiz else None)
        result = train(run, data, progress=context.progress)
        if context.processes.is_main:
            _mark_done(directory, result.seconds)
    return result


def export_stage(context: Context, new: Path, previous: dict[str, str], trained: TrainResult) -> None:
    """Finished adapter into `new/adapter` (nothing where the whole model is trained)."""
    old = context.workspace.directory / "adapter"
    if previous.get("export") == context.keys["export"] and old.exists():
        logger.info("export: unchanged, taken from the last build")
        link_tree(old, new / "adapter")
        _name_base(new / "adapter", context.inputs.base_name)
        result = read_lock(context.workspace.directory / LOCK_FILE)["result"]
        context.dropped_energy_frac = result["dropped_energy_frac"]
        return
    from soka_serve.adapter.loss import percent

    output = context.loaded.manifest.output
    if context.method.whole_model:
        if "adapter" in output.write:
            logger.info("export: method = %r makes no adapter; the trained model goes to merged/", context.method.name)
        return
    with context.stage("export", "writing the adapter"):
        context.dropped_energy_frac = context.method.export(
            trained.directory, new / "adapter", output.adapter_dtype, output.adapter_terms
        )
        if output.adapter_terms != "all":
            logger.info("export: lost %s of the deltas' energy", percent(context.dropped_energy_frac))
        _name_base(new / "adapter", context.inputs.base_name)


def _name_base(adapter: Path, name: str) -> None:
    """Have an adapter name the base as it is called now: what is cached may have been made before it was moved."""
    file = adapter / CONFIG_FILE
    config = json.loads(file.read_text())
    if config.get("base_model_name_or_path") != name:
        config["base_model_name_or_path"] = name
        write_text_atomic(file, json.dumps(config, indent=2, sort_keys=True) + "\n")


def merge_stage(context: Context, new: Path, previous: dict[str, str], trained: TrainResult) -> None:
    """Merged dense model into `new/merged`, where the manifest asks for one."""
    key = context.keys.get("merge")
    if key is None:
        return
    old = context.workspace.directory / "merged"
    if previous.get("merge") == key and old.exists():
        logger.info("merge: unchanged, taken from the last build")
        link_tree(old, new / "merged")
        return
    with context.stage("merge", "adding the adapter to the base weights"):
        source = trained.directory if context.method.whole_model else new / "adapter"
        dtype, name = context.loaded.manifest.output.merged_dtype, context.inputs.base_name
        context.method.merge(source, DenseOutput(context.base, new / "merged", dtype, name, context.progress))


def check_stage(
    context: Context, new: Path, previous: dict[str, str], questions: Questions | None
) -> QuickCheck | None:
    """Answer a few held-out problems with the base and with the artefact as it was written."""
    old = context.workspace.directory / "check.json"
    if previous.get("check") == context.keys["check"] and old.exists():
        logger.info("check: unchanged, taken from the last build")
        shutil.copy2(old, new / "check.json")
        return QuickCheck.read(old)
    if questions is None:
        return None
    from soka_serve.base.cpu import fast_products
    from soka_serve.compiler.artefact import load_base_of, load_result

    with context.stage("check", f"answering {questions.limit} held-out problems before and after"), fast_products():
        limit = context.loaded.manifest.eval.max_new_tokens
        model = load_base_of(context)
        before = answer(model, context.base.tokenizer, questions, limit)
        after = answer(load_result(model, new), context.base.tokenizer, questions, limit)
        check = QuickCheck(questions.prompts[:SAMPLES], questions.expected[:SAMPLES], before, after)
        check.write(new / "check.json")
    return check


def measure_stage(context: Context, new: Path, previous: dict[str, str], training: EncodedSet) -> dict[str, Any] | None:
    """What `[output] measure` names, by name, also in `new/measured.json`; None where it names nothing."""
    key = context.keys.get("measure")
    if key is None:
        return None
    old = context.workspace.directory / MEASURED_FILE
    if previous.get("measure") == key and old.exists():
        logger.info("measure: unchanged, taken from the last build")
        shutil.copy2(old, new / MEASURED_FILE)
    else:
        from soka_serve.compiler.measures import MEASURES

        names = context.loaded.manifest.output.measure
        with context.stage("measure", f"measuring {', '.join(names)}"):
            found = {name: MEASURES[name](context, new, training) for name in names}
            write_text_atomic(new / MEASURED_FILE, json.dumps(found, indent=1) + "\n")
    measured: dict[str, Any] = json.loads((new / MEASURED_FILE).read_text())
    return measured


def _mark_done(directory: Path, seconds: float) -> None:
    """Written last: a cached stage without it did not run to its end."""
    write_text_atomic(directory / "done.json", json.dumps({"seconds": seconds}))


def _seconds_of(directory: Path) -> float:
    return float(json.loads((directory / "done.json").read_text())["seconds"])
