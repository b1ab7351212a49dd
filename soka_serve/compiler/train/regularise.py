"""`[train.regularise]` at work: the rows of `soka_serve.regularisers` on a model in training.

What is a function of the factors alone has its gradient added once per optimiser step, before gradients are clipped or
scaled, whatever the number of batches: it is that of the sum of both losses. What depends on a batch is added to the
batch's loss. The loss that is logged stays the task's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import TrainerState

from soka_serve.compiler.methods.adapter_files import ADAPTER
from soka_serve.compiler.methods.method import Method
from soka_serve.data.collate import IGNORED
from soka_serve.errors import PlanError
from soka_serve.kron import Factors
from soka_serve.peft import soka_layers
from soka_serve.peft.parts import PARTS
from soka_serve.regularisers import REGULARISERS, Constraint, Divergence, Guard, Penalty, Rewrite


def check_regularisers(chosen: Mapping[str, float], method: Method, *, subtracted: bool, partly: bool) -> None:
    """Refuse regularisers that a run has nothing for, with methods too that manifests do not name.

    Args:
        chosen: what the manifest says, by name.
        method: what is trained.
        subtracted: modules start from factors that are subtracted again.
        partly: of some modules not all factors are trained, or something beside them.

    Raises:
        PlanError: names the regulariser.
    """
    for name in chosen:
        if REGULARISERS[name].kronecker and not method.kronecker:
            raise PlanError(f"train.regularise.{name} belongs to method = 'soka'; the method is {method.name!r}")
        if REGULARISERS[name].needs_base and not method.keeps_base:
            raise PlanError(f"train.regularise.{name} asks the base, and method = {method.name!r} changes its weights")
        if REGULARISERS[name].own_delta and subtracted:
            raise PlanError(f"train.regularise.{name}: starting factors are subtracted, so theta is not the delta")
        if REGULARISERS[name].kronecker and partly:
            raise PlanError(f"train.regularise.{name} acts on terms that are trained whole, with nothing beside them")


def check_devices(chosen: Mapping[str, float], devices: int) -> None:
    """Refuse what several GPUs in one process cannot do.

    Raises:
        PlanError: names the regulariser.
    """
    for name in chosen if devices > 1 else ():
        if isinstance(REGULARISERS[name], Divergence):
            raise PlanError(
                f"train.regularise.{name} needs a process per GPU; this one has {devices}",
                hint="start it with accelerate launch, or show it one GPU (CUDA_VISIBLE_DEVICES=0)",
            )


class Regularisation:
    """The regularisers of one run.

    Args:
        chosen: what the manifest says, by name.
        guards: what modules may do, from `make_guards`.
    """

    def __init__(self, chosen: Mapping[str, float], guards: Mapping[str, Guard] | None = None) -> None:
        self.chosen = chosen
        self.guards = guards or {}
        self.guarded_by = next((name for name in chosen if isinstance(REGULARISERS[name], Constraint)), "")
        self._values: dict[str, list[Tensor]] = {}

    def _note(self, name: str, value: Tensor) -> None:
        self._values.setdefault(name, []).append(value.detach().float().reshape(()))

    def logged(self, mean: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The mean of each value since the last call.

        Args:
            mean: over the processes; collective.
        """
        found = {name: float(mean(torch.stack(values).mean())) for name, values in self._values.items()}
        self._values.clear()
        return found

    @property
    def asks_base(self) -> bool:
        """Whether `divergence` is to be added to each batch's loss."""
        return any(isinstance(REGULARISERS[name], Divergence) for name in self.chosen)

    def divergence(self, base: Tensor, adapted: Tensor, labels: Tensor, share: float | Tensor | None) -> Tensor:
        """What is added to the loss of one batch: a scalar that is 0, with the gradient of the divergences.

        Args:
            base, adapted: logits (rows, tokens, vocabulary) without and with the adapter.
            labels: (rows, tokens); the logits at a position meet the label behind it.
            share: what one position counts; None: one over their number.
        """
        counted = labels[:, 1:] != IGNORED
        added = []
        for name, weight in self.chosen.items():
            if isinstance(row := REGULARISERS[name], Divergence):
                values = row.divergences(base[:, :-1][counted], adapted[:, :-1][counted])
                self._note(name, values.mean())
                added.append(weight * (values.mean() if share is None else values.sum() * share))
        total = torch.stack(added).sum()
        return total - total.detach()

    def add_gradients(self, model: nn.Module, loss_scale: float) -> None:
        """Add the penalties' gradients to those of the factors.

        Args:
            model: what is trained; its gradients are those of a whole step.
            loss_scale: what the task's gradients are multiplied by, in float16.

        Collective where parameters are sharded (FSDP 2).
        """
        rows = [(REGULARISERS[name], weight) for name, weight in self.chosen.items()]
        penalties = [(row, weight) for row, weight in rows if isinstance(row, Penalty)]
        if not penalties:
            return
        layers = soka_layers(model, ADAPTER).values()
        copies = [_map(layer.theta(ADAPTER), _leaf) for layer in layers]
        starts = [None if (f := layer.began(ADAPTER)) is None else _map(f, _whole) for layer in layers]
        terms = []
        for row, weight in penalties:
            value = row.penalty(list(zip(copies, starts, strict=True)))
            self._note(row.name, value)
            terms.append(weight * loss_scale * value)
        parameters = [p for layer in layers for p in _tensors(layer.theta(ADAPTER))]
        leaves = [leaf for factors in copies for leaf in _tensors(factors)]
        gradients = torch.autograd.grad(torch.stack(terms).sum(), leaves, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None and parameter.grad is not None:
                parameter.grad.add_(_like(gradient, parameter.grad))

    def guard_gradients(self, model: nn.Module) -> None:
        """Take out of the gradients what a constraint forbids; collective where parameters are sharded."""
        energies, sharded = [], False
        for part, parameter, guard in self._guarded(model):
            if (gradient := parameter.grad) is not None:
                here, allowed = _local(gradient), _allowed(guard, part, gradient)
                energies.append(torch.stack([t.double().square().sum() for t in (here, allowed)]))
                here.copy_(allowed)
                sharded = sharded or here is not gradient
        if energies:
            total = torch.stack(energies).sum(0)
            if sharded:
                torch.distributed.all_reduce(total)
            self._note(self.guarded_by, 1 - total[1] / total[0] if total[0] > 0 else total[0])

    def attach(self, optimizer: torch.optim.Optimizer, model: nn.Module, state: Callable[[], TrainerState]) -> None:
        """Have each step of an optimiser held to the constraints, and factors rewritten after those whose turn it is.

        Args:
            optimizer: of the factors.
            model: what is trained.
            state: gives the Trainer's, which tells the number of the step.
        """
        before: list[Tensor] = []

        @torch.no_grad()
        def remember(*_: Any) -> None:
            before[:] = [parameter.detach().clone() for _, parameter, _ in self._guarded(model)]

        @torch.no_grad()
        def project(*_: Any) -> None:
            for (part, parameter, guard), old in zip(self._guarded(model), before, strict=True):
                value = parameter.detach()
                _local(value).copy_(_local(old) + _allowed(guard, part, value - old))

        def rewrite(stepped: torch.optim.Optimizer, *_: Any) -> None:
            if (step := state().global_step + 1) < state().max_steps:
                self.rewrite(model, stepped, step)

        if self.guards:
            optimizer.register_step_pre_hook(remember)
            optimizer.register_step_post_hook(project)
        if any(isinstance(REGULARISERS[name], Rewrite) for name in self.chosen):
            optimizer.register_step_post_hook(rewrite)

    @torch.no_grad()
    def rewrite(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Give the factors the form that a row asks for after so many steps; all processes take the first one's."""
        for name, every in self.chosen.items():
            if not isinstance(row := REGULARISERS[name], Rewrite) or step % every:
                continue
            values = []
            for layer in soka_layers(model, ADAPTER).values():
                parameters = _tensors(layer.theta(ADAPTER))
                found, value = row.rewritten(Factors(*map(_whole, parameters)))
                values.append(value)
                for parameter, tensor in zip(parameters, _tensors(found), strict=True):
                    self._exchange(parameter, tensor.contiguous(), optimizer)
            self._note(name, torch.stack(values).mean())

    def _exchange(self, parameter: Tensor, new: Tensor, optimizer: torch.optim.Optimizer) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(new, 0)
        value = parameter.detach()
        _local(value).copy_(_local(_like(new, value)))
        for average in optimizer.state.get(parameter, {}).values():
            if isinstance(average, Tensor):
                average.zero_()

    def _guarded(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Guard]]:
        """Each trained part of the factors."""
        for name, layer in soka_layers(model, ADAPTER).items() if self.guards else ():
            for part in PARTS:
                if (parameter := getattr(layer, f"soka_{part}")[ADAPTER]).requires_grad:
                    yield part, parameter, self.guards[name]


def make_guards(
    chosen: Mapping[str, float], model: nn.Module, start: Mapping[str, Factors], device: torch.device
) -> dict[str, Guard]:
    """What each module may do, by its name; none without a constraint.

    Args:
        chosen: what the manifest says, by name.
        model: the PEFT model, before anything shards it.
        start: theta at the start of training by module name, also where a run goes on: so that it goes on exactly.
        device: where it is trained.

    Raises:
        PlanError: nothing is left to train.
    """
    guards: dict[str, Guard] = {}
    for key, count in chosen.items():
        if isinstance(row := REGULARISERS[key], Constraint):
            for name, layer in soka_layers(model, ADAPTER).items():
                weight, theta = layer.float_weight().to(device), start[name].to(device=device)
                try:
                    guards[name] = row.guard(weight, theta, int(count))
                except ValueError as error:
                    raise PlanError(f"train.regularise.{key} = {count}: {name}: {error}") from error
    return guards


def base_logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The logits of a batch without adapter, dropout and gradients: those of the base.

    Args:
        model: a PEFT model.
        batch: inputs of the model; its labels are left out.
    """
    with without_adapters(model), torch.no_grad():
        logits: Tensor = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    return logits


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Within it a model is its base, in evaluation mode.

    PEFT's own switch would also freeze the adapter and thaw all of it again, parts that are not trained among them.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    training = model.training
    model.eval()
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
        model.train(training)


def _tensors(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    return factors.left, factors.right, factors.sigma


def _map(factors: Factors, change: Callable[[Tensor], Tensor]) -> Factors:
    return Factors(*map(change, _tensors(factors)))


def _whole(tensor: Tensor) -> Tensor:
    """Without gradient; of a sharded tensor (DTensor) all of it."""
    value = tensor.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _leaf(tensor: Tensor) -> Tensor:
    return _whole(tensor).requires_grad_()


def _local(tensor: Tensor) -> Tensor:
    """A tensor, or this process's part of it, in the same memory."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def _allowed(guard: Guard, part: str, change: Tensor) -> Tensor:
    """This process's part of what is allowed of a change. Left and Right are sharded by terms, each moved alone."""
    if part == "sigma":
        return _local(_like(guard.allowed(part, _whole(change)), change))
    return guard.allowed(part, _local(change))


def _like(whole: Tensor, other: Any) -> Tensor:
    """A tensor that every process has, sharded as another one is."""
    if not hasattr(other, "device_mesh"):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh = other.device_mesh
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=other.placements)
