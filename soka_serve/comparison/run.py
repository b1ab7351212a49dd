"""One run of a comparison: one method, dataset, learning rate and seed, trained and measured, as a record.

It goes through what `soka-serve build` goes through: the same encoding, initialisation, Trainer and data order. It
leaves out what only a build needs (resume points, export), and answers problems with the model in memory.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PrinterCallback, set_seed
from transformers.trainer_utils import SaveStrategy

from soka_serve.base.model import quiet_bars
from soka_serve.comparison.callbacks import AnswerCallback, MemoryMeter, ProblemSet, Recorder, Trace
from soka_serve.comparison.plan import RunSpec
from soka_serve.comparison.problems import test_problems, validation_problems
from soka_serve.comparison.suite import Contender, LoadedSuite, manifest_of
from soka_serve.compiler.context import Context, prepare
from soka_serve.compiler.methods import METHODS
from soka_serve.compiler.stages import encode, init_stage
from soka_serve.compiler.train.run import TrainingRun
from soka_serve.compiler.train.train import build_model, make_rows
from soka_serve.compiler.train.trainer import SokaTrainer, make_arguments
from soka_serve.data.collate import PadCollator
from soka_serve.errors import DivergedError
from soka_serve.io.file_names import WEIGHTS_FILE
from soka_serve.io.workspace import Workspace
from soka_serve.kron import Factors
from soka_serve.manifest.read import LoadedManifest

_BATCHES_HASHED = 50


def measure_run(loaded: LoadedSuite, spec: RunSpec, work: Path) -> dict[str, Any]:
    """Train and measure; a run that diverges gives a record that says so.

    Args:
        loaded: the suite.
        spec: which run.
        work: folder for what lies on disk meanwhile, and for hashes of the base that all runs share.

    Raises:
        SokaError: anything that the user can mend, but a loss that is not finite.
    """
    started = time.monotonic()
    memory, trace = MemoryMeter(), Trace()
    suite, dataset, contender = loaded.suite, spec.dataset_of(loaded.suite), loaded.suite.contender(spec.method)
    manifest = manifest_of(suite, contender, dataset, rate=spec.rate, seed=spec.seed)
    as_manifest = LoadedManifest(manifest, loaded.path, loaded.directory, "", loaded.sha256)
    record: dict[str, Any] = {"status": "done", "error": None}
    final = spec.stage == "final"
    with tempfile.TemporaryDirectory(prefix="run-", dir=work) as folder, quiet_bars(), warnings.catch_warnings():
        # Of libraries, about their own insides; a comparison of eleven methods would drown in them.
        warnings.simplefilter("ignore")
        workspace = Workspace(Path(folder), spec.key)
        workspace.cache.mkdir(parents=True)
        context = prepare(as_manifest, workspace, progress=False)
        tokenizer = context.base.tokenizer
        choose = test_problems if final else validation_problems
        problems = choose(dataset, suite.protocol, loaded.directory, tokenizer)
        trial = _Trial(context, contender, workspace.cache, tokenizer.pad_id)
        trainable = [p for p in trial.model.parameters() if p.requires_grad]
        questions = ProblemSet(
            problems,
            context.base.transformers_tokenizer,
            chats=dataset.data.messages is not None,
            longest=suite.protocol.max_new_tokens,
        )
        evaluations = suite.protocol.evaluations if final else 1
        prepared_s = time.monotonic() - started
        trainer = trial.trainer([Recorder(trace), AnswerCallback(questions, evaluations, trace, memory)])
        try:
            trainer.train()
        except DivergedError as error:
            record.update(status="diverged", error=error.message)
        record["base_parameters"] = context.base.layout.size.parameters
        record["trainable_parameters"] = sum(p.numel() for p in trainable if p.requires_grad)
        if final:
            record["adapter_bytes"] = trial.size_on_disk()
        record["batches_sha256"] = trial.collator.digest()
    correct = 0 if record["status"] == "diverged" else trace.correct.get(trainer.state.max_steps, 0)
    return {
        **record,
        "correct": correct,
        "best_correct": max([correct, *trace.correct.values()]),
        "correct_at": {str(step): right for step, right in trace.correct.items()},
        "problems": len(problems),
        **trace.summary(),
        "prepare_s": round(prepared_s, 2),
        "run_s": round(time.monotonic() - started, 2),
    }


class _Trial:
    """The model of one run with its data, to be trained."""

    def __init__(self, context: Context, contender: Contender, folder: Path, pad_id: int) -> None:
        self.context, self.contender, self.folder = context, contender, folder
        manifest, method = context.loaded.manifest, METHODS[contender.method]
        training, _ = encode(context)
        start = init_stage(context, training) if method.kronecker else None
        self.run = TrainingRun(
            model_dir=context.base.directory,
            manifest=manifest,
            method=method,
            targets=[t.module.name for t in context.targets],
            work_dir=folder,
            factors={n: _fold(f, contender.fold_sigma) for n, f in start.factors.items()} if start else {},
            initial=start.initial_modules if start else frozenset(),
            batches=self._calibration,
        )
        self.arguments = make_arguments(manifest.train, folder, name=contender.name, evaluate=False)
        self.arguments.save_strategy = SaveStrategy.NO
        self.rows, _ = make_rows(self.run, training, None)
        self.collator = _HashingCollator(PadCollator(pad_id, 1 if self.arguments.use_cpu else 8))
        PartialState()
        set_seed(manifest.train.seed)  # as train() does: the random factors of LoRA and others
        self.model = build_model(self.run, None, self.arguments.device)

    def _calibration(self) -> list[dict[str, torch.Tensor]]:
        """The first batches of a seeded shuffle, as for the calibration of SoKA."""
        train = self.run.manifest.train
        generator = torch.Generator().manual_seed(train.seed)
        order = torch.randperm(len(self.rows), generator=generator).tolist()
        wanted = order[: self.contender.calibration_batches * train.batch_size]
        collate = self.collator.collator
        return [
            {
                name: tensor.to(self.arguments.device)
                for name, tensor in collate([self.rows[i] for i in wanted[at : at + train.batch_size]]).items()
            }
            for at in range(0, len(wanted), train.batch_size)
        ]

    def trainer(self, callbacks: list[Any]) -> SokaTrainer:
        """The Trainer of builds, without resume points."""
        trainer = SokaTrainer(
            self.run.manifest.train,
            model=self.model,
            args=self.arguments,
            train_dataset=self.rows,
            data_collator=self.collator,
            callbacks=[*self.run.method.callbacks(), *callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def size_on_disk(self) -> int:
        """Bytes of the tensors that a user keeps: a finished adapter of the untouched base, or the whole model."""
        method, trained = self.run.method, self.folder / "trained"
        if method.whole_model:
            return self.context.base.layout.size.weight_bytes
        self.model.save_pretrained(str(self.folder / "saved"))
        trained.mkdir()
        method.collect(
            self.folder / "saved", trained, initial_dir=self.run.initial_dir, base_dir=self.context.base.directory
        )
        method.export(trained, self.folder / "out", "float32")
        return (self.folder / "out" / WEIGHTS_FILE).stat().st_size


def _fold(factors: Factors, how: str) -> Factors:
    """Take sigma into the factors, and leave 1 in its place."""
    if how == "no":
        return factors
    left_power = 1.0 if how == "left" else 0.5
    sigma = factors.sigma[:, None, None]
    ones = torch.ones_like(factors.sigma)
    return Factors(factors.left * sigma**left_power, factors.right * sigma ** (1 - left_power), ones)


class _HashingCollator:
    """Collates, and hashes the first batches, so that equal data order is a fact of the records."""

    def __init__(self, collator: PadCollator) -> None:
        self.collator = collator
        self._hash, self._seen = hashlib.sha256(), 0

    def __call__(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        batch = self.collator(rows)
        if self._seen < _BATCHES_HASHED:
            self._seen += 1
            self._hash.update(batch["input_ids"].numpy().tobytes())
        return batch

    def digest(self) -> str:
        """Hash of the batches so far."""
        return self._hash.hexdigest()[:16]
