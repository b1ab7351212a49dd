"""The transformers Trainer, set up from a manifest: arguments, optimiser groups, and what a bad loss means."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from soka_serve.base.cpu import attention_for
from soka_serve.compiler.methods.method import Trainable
from soka_serve.compiler.train.callbacks import Pruning, read_spectra, tracker_metrics
from soka_serve.compiler.train.clip import RelativeClip
from soka_serve.compiler.train.compiled import compiled_layers, plain_layers
from soka_serve.compiler.train.decay import anneal_weight_decay, decay_share
from soka_serve.compiler.train.installed import check_installed
from soka_serve.compiler.train.length_groups import LengthGroups
from soka_serve.compiler.train.optimisers import make_optimiser, stored_classes
from soka_serve.compiler.train.packing import check_packing
from soka_serve.compiler.train.precision import training_device
from soka_serve.compiler.train.regularise import Regularisation, base_logits, make_guards
from soka_serve.compiler.train.run import TrainingRun
from soka_serve.compiler.train.trained_positions import output_layer, trained_positions
from soka_serve.errors import CheckpointError, DivergedError, PlanError
from soka_serve.io.warn_once import warn
from soka_serve.manifest.optimisers import OPTIMISERS
from soka_serve.manifest.schema import Train
from soka_serve.peft.optimizer import parameter_groups, pull_to_initial

logger = logging.getLogger(__name__)

_DEFAULT_EPOCHS = 1.0
_CHECKPOINTS_KEPT = 2


def make_arguments(train: Train, work_dir: Path, *, name: str, evaluate: bool, precision: str) -> TrainingArguments:
    """The manifest's [train] table as TrainingArguments; checkpoints go to `work_dir`.

    Neither `steps` nor `epochs` means one epoch. Without an accelerator (or under `accelerate launch --cpu`) it trains
    on the CPU. `precision` is the autocast dtype, as `computing_dtype` tells it.

    Raises:
        PlanError: float16, or an optimiser for GPUs, without a GPU.
        BuildError: the optimiser or a tracker in `report_to` is not installed.
    """
    use_cpu = training_device().type == "cpu"
    _check(train, use_cpu)
    optimiser = OPTIMISERS[train.optimiser]
    judged_by = "loss" if train.answered is None else "accuracy"
    warm_constant = train.schedule == "constant" and train.warmup_frac > 0
    return TrainingArguments(
        output_dir=str(work_dir),
        run_name=name,
        max_steps=train.steps if train.steps is not None else -1,
        num_train_epochs=train.epochs if train.epochs is not None else _DEFAULT_EPOCHS,
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulate,
        optim=optimiser.trainer,
        optim_target_modules="all-linear" if optimiser.projects else None,
        learning_rate=train.rate,
        weight_decay=train.weight_decay,
        lr_scheduler_type="constant_with_warmup" if warm_constant else train.schedule,
        warmup_steps=train.warmup_frac,  # below 1 it is a share of the steps, rounded up
        max_grad_norm=math.inf if train.max_grad_norm is None else train.max_grad_norm,
        bf16=precision == "bfloat16",
        fp16=precision == "float16",
        use_cpu=use_cpu,
        **_checkpointing(train.gradient_checkpointing),
        seed=train.seed,
        data_seed=train.seed,
        logging_strategy="steps",
        logging_steps=train.log_every,
        logging_nan_inf_filter=False,  # a loss that is not finite shall be seen, not averaged away
        eval_strategy="steps" if evaluate else "no",
        eval_steps=train.eval_every if evaluate else None,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=train.save_every,
        save_total_limit=_CHECKPOINTS_KEPT,
        metric_for_best_model=judged_by if train.early_stopping is not None else None,
        greater_is_better=judged_by == "accuracy" if train.early_stopping is not None else None,
        restore_callback_states_from_checkpoint=train.early_stopping is not None,
        report_to=list(train.report_to) or "none",
        disable_tqdm=True,  # we have our own bar
        dataloader_pin_memory=not use_cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        # Every trained parameter is used at every step, and buffers never change.
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
    )


def _check(train: Train, use_cpu: bool) -> None:
    """Refuse a precision or an optimiser that the device does not have, and what is not installed."""
    if train.precision == "float16" and use_cpu:
        raise PlanError(
            'train.precision = "float16" needs a GPU, and there is none',
            hint='"bfloat16" works on CPUs too; "float32" is the most exact',
        )
    if OPTIMISERS[train.optimiser].needs_gpu and use_cpu:
        raise PlanError(
            f'train.optimiser = "{train.optimiser}" needs a GPU, and there is none',
            hint='"adamw" and "adafactor" work on CPUs too',
        )
    check_installed(train)


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """The arguments for recomputing activations, as the installed transformers calls them."""
    known = {field.name for field in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: wanted, f"{name}_kwargs": {"use_reentrant": False} if wanted else None}


class SokaTrainer(Trainer):  # type: ignore[misc, unused-ignore]
    """The Trainer with all of [train] that changes a step: whoever trains a run has it whole.

    Args:
        run: what is trained.
        model: of `run`; of an interrupted run as its checkpoint left it.
        args: from `make_arguments`.
        facts: what `facts` gave before the interruption; None at a start.
        accuracy: of a model's answers to some problems; evaluations then have it beside the loss.
        callbacks: what watches and saves.
        others: what else `transformers.Trainer` takes.
    """

    def __init__(
        self,
        run: TrainingRun,
        model: Trainable,
        args: TrainingArguments,
        *,
        facts: Mapping[str, Any] | None = None,
        accuracy: Callable[[Any], float] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **others: Any,
    ) -> None:
        self.recipe = recipe = run.manifest.train
        self._accuracy = accuracy
        self.optimizer: Any
        self.control: Any
        self._packing_checked = False
        self._was_zero = False
        self.clip = RelativeClip(recipe.clip, facts["norms"] if facts else ())
        guards = make_guards(recipe.regularise.chosen, model, run.factors, args.device)
        self.regularisation = Regularisation(recipe.regularise.chosen, guards)
        self.pruning = None if recipe.prune is None else Pruning(recipe.prune)
        if self.pruning and facts:
            self.pruning.restore(facts["prune"])
        super().__init__(
            model=model,
            args=args,
            callbacks=[*run.method.callbacks(), *([self.pruning] if self.pruning else []), *callbacks],
            optimizers=(run.method.optimizer(model, recipe.rate, recipe.weight_decay), None),
            **others,
        )
        self.remove_callback(PrinterCallback)
        if self.is_deepspeed_enabled and recipe.regularise.chosen:
            raise PlanError(
                f"train.regularise.{next(iter(recipe.regularise.chosen))} does not go with DeepSpeed, which keeps "
                "gradients and factors to itself",
                hint="leave it out, or train with FSDP or DDP",
            )
        if self.is_deepspeed_enabled and recipe.max_grad_norm is None:
            raise PlanError(
                f"train.clip = {recipe.clip:g} does not go with DeepSpeed, which keeps gradients to itself",
                hint="set train.max_grad_norm, or train with FSDP or DDP",
            )

        if accuracy is not None and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise PlanError(
                "train.answered does not go with DeepSpeed or FSDP: no process has the whole model to answer with",
                hint="leave it out: the loss then says which evaluation is the best",
            )

    def facts(self) -> dict[str, Any]:
        """What a resumed run needs beside what the Trainer writes."""
        return {"norms": list(self.clip.norms)} | ({"prune": self.pruning.facts()} if self.pruning else {})

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """The manifest's optimiser, with the learning rates of `soka_serve.peft.optimizer` for SoKA's factors.

        Weight decay spares biases and norms, as the Trainer's own groups do. For SoKA it pulls deltas to zero, hence
        the model to the base.

        Raises:
            PlanError: nothing is trained; or DeepSpeed steps copies of the factors, where weight decay pulls them.
        """
        if self.optimizer is not None:  # the method's own
            anneal_weight_decay(self.optimizer, self._decay_share)
            return self.optimizer
        target = self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(target))
        rate = self.args.learning_rate
        groups = parameter_groups(target, rate, self.recipe.multipliers, self.args.weight_decay, decayed)
        if not groups:
            raise PlanError(
                "nothing is left to train: left_lr, right_lr and sigma_lr are all 0",
                hint="raise one of them, or set steps = 0 to export the initialisation",
            )
        self.optimizer = make_optimiser(self.recipe.optimiser, self, groups, target)
        pulled = pull_to_initial(self.optimizer, target, self.args.weight_decay, decayed, self._decay_share)
        anneal_weight_decay(self.optimizer, self._decay_share)
        if pulled and self.is_deepspeed_enabled:
            raise PlanError(
                f"train.weight_decay = {self.args.weight_decay:g} does not go with DeepSpeed, which steps copies of "
                "the factors",
                hint="leave it out, or train with FSDP or DDP",
            )
        self.regularisation.attach(self.optimizer, target, lambda: self.state)
        return self.optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own, with compiled layers where the recipe asks for them.

        Raises:
            PlanError: FSDP or DeepSpeed, which put the layers in wrappers of their own; or no decoder layers.
        """
        if not self.recipe.compile:
            return super().train(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise PlanError("train.compile does not go with DeepSpeed or FSDP", hint="leave it out")
        with compiled_layers(self.model):
            return super().train(*args, **kwargs)

    def _decay_share(self) -> float:
        """What is left of the weight decay at the step to come."""
        return decay_share(self.recipe.weight_decay_schedule, self.state.global_step, self.state.max_steps)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's own. A single step does not warm up, since a warm-up's first step has the rate 0."""
        if num_training_steps == 1:
            self.args.warmup_steps = 0
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The Trainer's own, or one that puts examples of similar lengths together."""
        if not self.recipe.group_by_length:
            return super()._get_train_sampler(train_dataset)
        rows = (self.train_dataset if train_dataset is None else train_dataset).rows
        group = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroups([len(row.input_ids) for row in rows], group, self.recipe.seed)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's loss, in training and evaluation, with logits of the positions that count alone."""
        head = output_layer(self.accelerator.unwrap_model(model)) if self.args.n_gpu <= 1 else None
        picked = nullcontext(inputs) if head is None else trained_positions(head, inputs)
        with picked as batch, self._attention(inputs["labels"].shape[-1]):
            if model.training and self.regularisation.asks_base:
                return self._loss_beside_base(model, batch, **kwargs)
            return super().compute_loss(model, batch, *args, **kwargs)

    def _attention(self, tokens: int) -> AbstractContextManager[None]:
        """Of rows of so many tokens. What is compiled keeps the first one that it sees: there, of the longest rows."""
        return attention_for(self.recipe.max_length if self.recipe.compile else tokens, self.args.device)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The loss of the evaluation examples and, where it is asked for, the accuracy of answers."""
        output = super().evaluation_loop(*args, **kwargs)
        if self._accuracy is not None:
            with plain_layers(self.model):
                model = self.accelerator.unwrap_model(self.model)
                found = [self._accuracy(model) if self.args.process_index == 0 else 0.0]
            (output.metrics["eval_accuracy"],) = broadcast_object_list(found)
        return output

    def _loss_beside_base(
        self, model: nn.Module, batch: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The model's loss, with the gradient of its divergence from the base too, which has a forward pass of its own.

        Like the loss's own, the mean is over the positions of a whole step: all batches and processes.
        """
        base = base_logits(self.accelerator.unwrap_model(model), batch)
        loss: torch.Tensor
        loss, outputs = super().compute_loss(model, batch, return_outputs=True, num_items_in_batch=num_items_in_batch)
        share = None if num_items_in_batch is None else self.accelerator.num_processes / num_items_in_batch
        return loss + self.regularisation.divergence(base, outputs.logits, batch["labels"], share)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass.

        Raises:
            PlanError: before the first: packed examples see each other.
            DivergedError: the loss is not finite.
            CheckpointError: since the base's weights are not.
        """
        if self.recipe.packing and not self._packing_checked:
            self._check_packing(args[0] if args else kwargs["model"])
        inputs = kwargs["inputs"] if "inputs" in kwargs else args[1]
        with self._attention(inputs["labels"].shape[-1]):  # checkpointing runs layers again, backward
            loss: torch.Tensor = super().training_step(*args, **kwargs)
        if not bool(torch.isfinite(loss)):
            self._check_base()
            step = self.state.global_step + 1
            raise DivergedError(
                f"training diverged: the loss is {loss.item()} at step {step} of {self.state.max_steps}",
                hint=f"lower train.learning_rate (now {self.args.learning_rate:g}), or raise train.warmup_frac "
                f"(now {self.recipe.warmup_frac:g})"
                + ('; "bfloat16" overflows later than "float16"' if self.args.fp16 else ""),
            )
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Add the regularisers' gradients and take out what they forbid; clip or normalise; returns the norm before."""
        scaler = self.accelerator.scaler
        self.regularisation.add_gradients(model, 1.0 if scaler is None else scaler.get_scale())
        self.regularisation.guard_gradients(model)
        if self.recipe.max_grad_norm is None:
            self.args.max_grad_norm = self.clip.limit
        norm = super()._clip_grad_norm(model)
        if norm is None:  # DeepSpeed clips by itself, later
            return norm
        whole = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        self.clip.add(whole)
        if whole == 0 and not self._was_zero:
            self._was_zero = True
            step, rate = self.state.global_step + 1, self.args.learning_rate
            warn(logger, "step %d: the gradient is zero: nothing is learned from it (learning_rate is %g)", step, rate)
        if self.recipe.max_grad_norm is None and self.clip.multiple == 0 and math.isfinite(whole) and whole > 0:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(whole)
        return norm

    def _check_packing(self, wrapped: nn.Module) -> None:
        """`check_packing`, with the forward pass that training has (wrappers, autocast, devices), but for dropout."""
        model = self.accelerator.unwrap_model(wrapped)
        training = wrapped.training

        def forward(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
            inputs = self._prepare_inputs({k: v for k, v in batch.items() if k != "labels"})
            with torch.no_grad(), self.compute_loss_context_manager():
                logits: torch.Tensor = wrapped(**inputs).logits
            return logits

        wrapped.eval()
        try:
            check_packing(
                model,
                self.train_dataset.rows,
                self.data_collator,
                forward,
                half=self.args.bf16 or self.args.fp16 or any(p.element_size() < 4 for p in model.parameters()),
                together=self.args.per_device_train_batch_size > 1,
            )
        finally:
            wrapped.train(training)
        self._packing_checked = True

    def _check_base(self) -> None:
        """A loss that is not finite has another reason than the learning rate where the base's own weights are not.

        Raises:
            CheckpointError: names the weights.
        """
        untouched = self.state.global_step == 0
        broken = [
            name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            for name, p in self.model.named_parameters()
            if (untouched or not p.requires_grad) and p.is_floating_point() and not bool(p.detach().isfinite().all())
        ]
        if broken:
            more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
            raise CheckpointError(
                f"the base's weights hold NaN or infinity: {broken[0]}{more}",
                hint="the checkpoint is damaged: fetch or save the checkpoint again",
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the base learning rate and the regularisers' values; send each module's terms to the trackers."""
        if "loss" in logs:
            logs |= self.regularisation.logged(lambda value: self.accelerator.gather(value).mean())
        if "learning_rate" in logs:
            # The group's own peak, which a resumed run has from its checkpoint: rates are measured when a run begins.
            # Its rate now, since the scheduler's last one is of before terms were dropped.
            group = self.optimizer.param_groups[0]
            logs["learning_rate"] = float(group["lr"]) * (self.args.learning_rate / float(group["initial_lr"]))
        super().log(logs, start_time)
        if self.recipe.report_to and "loss" in logs:
            # Not through super().log: that keeps everything in the state, which each checkpoint holds.
            metrics = tracker_metrics(read_spectra(self.model))
            if metrics:
                self.control = self.callback_handler.on_log(self.args, self.state, self.control, metrics)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with stored_classes(self.recipe.optimiser):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Skip loading except under FSDP: the model was built from the checkpoint, whose ranks may be smaller."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
