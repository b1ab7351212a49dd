"""One run of a comparison: one method, dataset, setting and seed, trained and measured, as a record.

It goes through what `soka-serve build` goes through: the same encoding, initialisation, Trainer and data order. It
leaves out what only a build needs (resume points, export), and measures the model in memory.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import set_seed
from transformers.trainer_utils import SaveStrategy

from soka_serve.base.cpu import attention_for, fast_products
from soka_serve.base.model import quiet_bars
from soka_serve.comparison.callbacks import MemoryMeter, Recorder, Trace
from soka_serve.comparison.held_out import SPLIT_SEED, HeldOut, HeldOutReader, is_right, without
from soka_serve.comparison.plan import RunSpec
from soka_serve.comparison.read import LoadedSuite
from soka_serve.comparison.settings import manifest_of
from soka_serve.compiler.answers import generate_answers
from soka_serve.compiler.context import prepare
from soka_serve.compiler.methods import METHODS
from soka_serve.compiler.stages import encode, init_stage
from soka_serve.compiler.train.precision import computing_dtype
from soka_serve.compiler.train.regularise import without_adapters
from soka_serve.compiler.train.run import TrainingRun
from soka_serve.compiler.train.train import build_model, make_rows
from soka_serve.compiler.train.trained_positions import output_layer, trained_positions
from soka_serve.compiler.train.trainer import SokaTrainer, make_arguments
from soka_serve.data.collate import IGNORED, PadCollator
from soka_serve.data.encode import EncodedExample
from soka_serve.errors import DivergedError, PlanError
from soka_serve.io.file_names import WEIGHTS_FILE
from soka_serve.io.hardware import cpu_name
from soka_serve.io.workspace import Workspace
from soka_serve.manifest.read import LoadedManifest

_BATCHES_HASHED = 50
_NO_ANSWERS: dict[str, Any] = {"answered": 0, "correct": 0, "answer_loss": None}
_ROWS = 8  # of a forward pass that measures losses: logits of a large vocabulary take much memory


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
    record: dict[str, Any] = {"status": "done", "error": None, "cpu": cpu_name()}
    with (
        tempfile.TemporaryDirectory(prefix="run-", dir=work) as folder,
        quiet_bars(),
        warnings.catch_warnings(),
        fast_products(),
    ):
        # Of libraries, about their own insides; a comparison of eleven methods would drown in them.
        warnings.simplefilter("ignore")
        trial = _Trial(loaded, spec, Path(folder))
        trainable = [p for p in trial.model.parameters() if p.requires_grad]
        record["prepare_s"] = round(time.monotonic() - started, 2)
        before = trial.base_losses()
        memory.start_training()
        try:
            trial.trainer([Recorder(trace)]).train()
        except DivergedError as error:
            record.update(status="diverged", error=error.message)
        record["training_peak_bytes"] = memory.peak_bytes()  # before the trained model is measured
        record["base_parameters"] = trial.context.base.layout.size.parameters
        record["trainable_parameters"] = sum(p.numel() for p in trainable if p.requires_grad)
        record["batches_sha256"] = trial.collator.digest()
        record |= trial.answers() if record["status"] == "done" else _NO_ANSWERS
        if not all(map(math.isfinite, record["answer_loss"] or ())):
            record |= {"status": "diverged", "error": "a held-out loss is not finite"} | _NO_ANSWERS
        if trial.final:
            after = trial.other_losses() if record["status"] == "done" else dict.fromkeys(before)
            record["other"] = {name: {"before": before[name], "after": after[name]} for name in before}
            record["adapter_bytes"] = trial.size_on_disk()
            record["suite"], record["claims_sha256"] = loaded.suite.name, loaded.suite.claims_sha256
    return {**record, **trace.summary(), "run_s": round(time.monotonic() - started, 2)}


class _Trial:
    """The model of one run with its data, to be trained and measured."""

    def __init__(self, loaded: LoadedSuite, spec: RunSpec, folder: Path) -> None:
        suite, self.dataset = loaded.suite, spec.dataset_of(loaded.suite)
        self.protocol, self.contender = suite.protocol, suite.contender(spec.method)
        self.final = spec.stage == "final"
        manifest = manifest_of(suite, self.contender, self.dataset, setting=spec.setting, seed=spec.seed)
        workspace = Workspace(folder, spec.key)
        workspace.cache.mkdir(parents=True)
        as_manifest = LoadedManifest(manifest, loaded.path, loaded.directory, "", loaded.sha256)
        self.context, self.folder = prepare(as_manifest, workspace, progress=False), workspace.cache
        tokenizer, method = self.context.base.tokenizer, METHODS[self.contender.method]
        reader = HeldOutReader(self.protocol, loaded.directory, tokenizer, manifest.train.max_length)
        test, validation = reader.problems(self.dataset)
        self.held_out: HeldOut = test if self.final else validation
        self.other = {text.name: reader.other(text) for text in suite.other if self.final}
        training = without(encode(self.context, SPLIT_SEED)[0], self.dataset, test, validation)
        start = init_stage(self.context, training) if method.kronecker else None
        self.run = TrainingRun(
            model_dir=self.context.base.directory,
            manifest=manifest,
            method=method,
            targets=[t.module.name for t in self.context.targets],
            work_dir=self.folder,
            stored=self.context.base.layout.size.dtype,
            factors=start.factors if start else {},
            initial=start.initial_modules if start else frozenset(),
            cut=start.cut if start else {},
            forms=start.forms if start else {},
            quantize=self.context.quantize,
            batches=self._calibration,
        )
        self.arguments = make_arguments(
            manifest.train,
            self.folder,
            name=self.contender.name,
            evaluate=False,
            precision=computing_dtype(manifest, self.run.stored),
        )
        self.arguments.save_strategy = SaveStrategy.NO
        self.rows, _ = make_rows(self.run, training, None)
        self.collator = _HashingCollator(PadCollator(tokenizer.pad_id, 1 if self.arguments.use_cpu else 8))
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
        return SokaTrainer(
            self.run,
            self.model,
            self.arguments,
            callbacks=callbacks,
            train_dataset=self.rows,
            data_collator=self.collator,
        )

    def answers(self) -> dict[str, Any]:
        """Loss of each held-out answer, and how many of those that the model writes itself are right."""
        asked = self.held_out.problems
        if self.final:
            asked = asked[: self.protocol.answered]
        elif self.protocol.choose_by == "loss":
            asked = ()
        texts = generate_answers(
            self.model,
            self.context.base.tokenizer,
            [problem.prompt for problem in asked],
            self.protocol.max_new_tokens,
            templated=self.dataset.data.messages is not None,
        )
        return {
            "answered": len(asked),
            "correct": sum(is_right(problem, text) for problem, text in zip(asked, texts, strict=True)),
            "answer_loss": self._losses(self.held_out.encoded),
        }

    def other_losses(self) -> dict[str, list[float]]:
        """Loss of each example of the texts that nothing is trained on."""
        return {name: self._losses(examples) for name, examples in self.other.items()}

    def base_losses(self) -> dict[str, list[float]]:
        """The same of the base, which some starts change before anything is trained."""
        if not self.run.method.keeps_base:
            return self.other_losses()
        with without_adapters(self.model):
            return self.other_losses()

    def _losses(self, examples: Sequence[EncodedExample]) -> list[float]:
        found = answer_losses(self.model, examples, self.collator.collator)
        return [round(loss, 5) for loss in found]

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


@torch.no_grad()
def answer_losses(model: Any, examples: Sequence[EncodedExample], collate: PadCollator) -> list[float]:
    """Mean cross-entropy (nats per token) of each example's labelled tokens, in the order of the examples.

    The model is put in evaluation mode meanwhile.
    """
    losses = [0.0] * len(examples)
    order = sorted(range(len(examples)), key=lambda at: len(examples[at].input_ids))
    head, training = output_layer(model), model.training
    if head is None:
        raise PlanError("the loss of this architecture is not that of the next token")
    model.eval()
    try:
        for start in range(0, len(order), _ROWS):
            chosen = order[start : start + _ROWS]
            batch: Mapping[str, torch.Tensor] = collate([examples[at] for at in chosen])
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            counts = (batch["labels"][:, 1:] != IGNORED).sum(1)
            with trained_positions(head, batch) as picked, attention_for(batch["labels"].shape[1], model.device):
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            each = torch.nn.functional.cross_entropy(logits[0, :-1].float(), picked["labels"][0, 1:], reduction="none")
            for at, tokens in zip(chosen, torch.tensor_split(each, counts.cumsum(0)[:-1].cpu()), strict=True):
                losses[at] = tokens.mean().item()
    finally:
        model.train(training)
    return losses


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
