"""Factors in and out of a PEFT model: built from given ones, read back, and pruned during training."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import peft
import torch
from peft import PeftModel
from torch import Tensor, nn

from soka_serve.errors import BuildError, PlanError
from soka_serve.kron import Factors
from soka_serve.kron.factors import energy_by_term
from soka_serve.peft.config import SokaConfig
from soka_serve.peft.layer import SokaLinear
from soka_serve.peft.optimizer import follow_terms
from soka_serve.trained import PLAIN, Form

log = logging.getLogger(__name__)


def soka_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, SokaLinear]:
    """The adapted layers of a model, by their name in the base (`model.layers.0.self_attn.q_proj`)."""
    return {
        module.module_name: module
        for module in model.modules()
        if isinstance(module, SokaLinear) and adapter_name in module.soka_left
    }


def build_soka_model(
    model: nn.Module,
    modules: Mapping[str, Factors],
    *,
    initial: bool,
    base_model: str | None = None,
    adapter_name: str = "default",
    forms: Mapping[str, Form] | None = None,
    **config: Any,
) -> PeftModel:
    """Adapt `model` with given factors.

    Args:
        model: the base; changed in place (its linear layers are wrapped, their weights untouched).
        modules: theta by full module name; ranks and shapes are theirs.
        initial: True keeps a frozen copy of theta as initial factors, so that the delta starts at exactly 0 (factors
            that approximate the weight itself); False starts from the factors' own delta.
        forms: what of a module is trained, by its name; default: everything.
        base_model: what to record as the base's name; default: the model's own.
        config: further fields of `SokaConfig`, such as `seed` or `modules_to_save`.

    Raises:
        PlanError: no modules, a name that the model lacks, or a shape that does not fit.
    """
    if not modules:
        raise PlanError("no modules to adapt", hint="every module was given rank 0, or no rule matches")
    soka = SokaConfig(
        init_soka_weights=False,
        target_modules=sorted(modules),
        soka_modules={
            name: {"rank": f.rank, "shape": list(f.shape), **(forms or {}).get(name, PLAIN).spec()}
            for name, f in modules.items()
        },
        soka_initial=initial,
        task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        **config,
    )
    adapted: PeftModel = peft.get_peft_model(model, soka, adapter_name=adapter_name)
    if base_model is not None:
        adapted.peft_config[adapter_name].base_model_name_or_path = base_model
    for name, layer in soka_layers(adapted, adapter_name).items():
        layer.set_factors(adapter_name, modules[name], modules[name] if initial else None)
    return adapted


def get_factors(peft_model: nn.Module, adapter_name: str = "default") -> tuple[dict[str, Factors], dict[str, Factors]]:
    """(theta, initial) by module name: detached float32 copies on the CPU; initial is empty where there is none."""
    theta, initial = {}, {}
    for name, layer in soka_layers(peft_model, adapter_name).items():
        theta[name] = _copy(layer.theta(adapter_name))
        start = layer.initial(adapter_name)
        if start is not None:
            initial[name] = _copy(start)
    return theta, initial


def term_energies(peft_model: nn.Module, adapter_name: str = "default") -> dict[str, list[float]]:
    """Energy of what each term does to the module, by module name.

    As `soka_serve.kron.factors.energy_by_term`: with initial factors, of what training made of the pair. Float64.
    """
    theta, initial = get_factors(peft_model, adapter_name)
    starts = {name: factors.to(torch.float64) for name, factors in initial.items()}
    return {name: energy_by_term(f.to(torch.float64), starts.get(name)).tolist() for name, f in theta.items()}


def drop_terms(
    peft_model: nn.Module,
    keep: Mapping[str, Sequence[int]],
    optimizer: Any | None = None,
    adapter_name: str = "default",
    *,
    scheduler: Any | None = None,
) -> None:
    """Prune: leave only the terms `keep[module]` (indices, any order) of each named module, in the model's order.

    A term goes together with its initial pair, so the delta loses exactly what training had added to that pair;
    dropping the trained half alone would throw -initial_k into the model. Parameters shrink in place and keep their
    identity, gradients and the optimizer's per-element state (AdamW's exp_avg and exp_avg_sq) are cut with them, and
    the config's ranks follow, so training goes on exactly as if the dropped terms had never been there. So do the
    rates of an optimizer from `create_soka_optimizer`, which are divided by the number of terms.

    Args:
        optimizer: whatever holds `state` by parameter: a torch optimizer, or accelerate's wrapper of one.
        scheduler: of the optimizer's rates, one that multiplies `base_lrs` as torch's `LambdaLR` does.

    Raises:
        PlanError: an unknown module, an index out of range or named twice, or nothing left to keep.
        BuildError: several processes (DDP and FSDP hold on to shapes), or optimizer state that cannot be cut.
    """
    layers = soka_layers(peft_model, adapter_name)
    problems = []
    for name, indices in keep.items():
        rank = len(layers[name].soka_sigma[adapter_name]) if name in layers else 0
        if name not in layers:
            problems.append(f"{name} has no adapter {adapter_name!r}")
        elif layers[name].has_added(adapter_name):
            problems.append(f"{name}: what is trained beside its factors belongs to all terms; none can be dropped")
        elif not indices or len(set(indices)) != len(indices) or min(indices) < 0 or max(indices) >= rank:
            problems.append(f"{name}: cannot keep terms {list(indices)} of {rank}")
    if problems:
        raise PlanError("; ".join(problems))
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise BuildError("terms cannot be pruned while several processes train", hint="leave [train.prune] out")
    config: SokaConfig = cast("Any", peft_model).peft_config[adapter_name]
    changed = {}
    for name, indices in keep.items():
        layer: Any = layers[name]
        chosen = sorted(indices)
        before = len(layer.soka_sigma[adapter_name])
        if len(chosen) == before:
            continue
        index = torch.tensor(chosen, device=layer.soka_sigma[adapter_name].device)
        for attribute, store in layer.stores(adapter_name).items():
            _cut(store[adapter_name], index, optimizer, f"{name}.{attribute}")
        changed[name] = layer.spec(adapter_name)
        log.info("%s: %d of %d terms kept", name, len(chosen), before)
    config.record({**config.soka_modules, **changed})
    if optimizer is not None:
        follow_terms(optimizer, scheduler)


def _cut(parameter: Tensor, index: Tensor, optimizer: Any | None, name: str) -> None:
    """Leave only the entries `index` of a parameter's first dimension, its gradient's and its optimizer state's."""
    shape = parameter.shape
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    for key, value in state.items():
        if isinstance(value, Tensor) and value.ndim > 0:
            if value.shape != shape:
                raise BuildError(
                    f"{name}: the optimizer's {key} is {tuple(value.shape)}, the parameter {tuple(shape)}; it cannot "
                    "be cut with the terms",
                    hint="pruning works with AdamW and other optimizers that keep one value per parameter element",
                )
            state[key] = value[index].clone()
    gradient = parameter.grad
    parameter.grad = None
    parameter.data = parameter.data[index].clone()
    if gradient is not None:
        parameter.grad = gradient[index].clone()


def _copy(factors: Factors) -> Factors:
    parts = (factors.left, factors.right, factors.sigma)
    return Factors(*(part.detach().to("cpu", torch.float32, copy=True) for part in parts))
