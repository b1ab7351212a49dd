"""Learning rates of the factors: one `lr` that means the same at every width, factor shape and number of terms.

Factors start small beside what training makes of them (a manifest's `scale`), and K(theta) is their product: what a
module changes grows with the square of the way that its factors have gone. An optimiser such as Adam moves every entry
of a parameter by about its rate. What a delta can do to an output is its largest singular value, that of factors with
random entries of RMS 1 being about (sqrt(m) + sqrt(n)) (sqrt(p) + sqrt(q)) = 4 S (`FactorShape.spread`). So

    rate of Left  = lr * RMS(Left) / sqrt(S) / c
    rate of Right = lr * RMS(Right) / sqrt(S) / c
    rate of sigma = lr * RMS(sigma) / c

let a term's largest singular value grow to about 4 sigma RMS(Left) RMS(Right) (lr t / c)^2 in t steps, whatever the
factors' shapes, sigma apart. At equal entries an outer product of vectors has a larger one than a product of square
factors, and moves less. Sigma only repeats what the size of Left and Right says already, and each of its steps moves
all of a term's entries together, so beside Left or Right it is trained only where that is asked for. The terms of one
module see the same gradients, so what they change adds up; modules change different things, whose squares add up. Hence
c^2 = r * sqrt(N), with r the module's number of terms and N the number of modules: all together change what the model
computes alike. docs/training.md says where that was measured.

Terms that are a delta and not subtracted (`init = "delta"`) are as large as they are, not small. Their factors move
sqrt(SMALL) as fast: with terms as large as the weight, size * lr^2 is then what it is for terms of the scale SMALL.
Those that mend a quantised base are smaller than it, and their size beside it is measured: with entries of RMS s in
units of the weight's, they move sqrt(SMALL / s) as fast, at most as fast as small ones. Their sigma is trained.

Weight decay pulls a module's delta to zero: factors to the initial ones that are subtracted from them, and to zero
where none are. Towards zero, K(theta) - K(theta0) would end as -K(theta0), which takes terms out of the base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from soka_serve.errors import PlanError
from soka_serve.kron.factors import Factors
from soka_serve.kron.shapes import FactorShape
from soka_serve.manifest.rules import SMALL
from soka_serve.peft.errors import FitError
from soka_serve.peft.layer import SokaLayer
from soka_serve.peft.parts import PARTS
from soka_serve.trained import Form

Multipliers: TypeAlias = Mapping[str, float | None]
"""Of the rates of "left", "right" and "sigma". None, for sigma, is 0 where it only repeats the size of factors that are
trained, else 1."""


def learning_rates(model: nn.Module, multipliers: Multipliers) -> dict[nn.Parameter, float]:
    """What to multiply `lr` by, for every factor of a model's SoKA adapters that needs gradients.

    Collective where parameters are sharded (FSDP 2), since the whole of each is measured.

    Args:
        multipliers: further ones.
    """
    trained = list(_trained(model))
    found: dict[nn.Parameter, float] = {}
    for layer, name in trained:
        moved = any(getattr(layer, f"soka_{p}")[name].requires_grad and multipliers[p] != 0 for p in ("left", "right"))
        for part, parameter, multiplier, repeats in _law(layer, name):
            if parameter.requires_grad:
                given = multipliers[part]
                asked = (0.0 if repeats and moved else 1.0) if given is None else given
                found[parameter] = multiplier * asked / len(trained) ** 0.25
    return found


def _trained(model: nn.Module) -> Iterator[tuple[SokaLayer, str]]:
    """Each layer with each of its adapters that are trained."""
    for layer in model.modules():
        if isinstance(layer, SokaLayer):
            for name in layer.adapter_names():
                if _is_trained(layer, name):
                    yield layer, name


def _is_trained(layer: SokaLayer, adapter: str) -> bool:
    return any(store[adapter].requires_grad for name, store in layer.stores(adapter).items() if "initial" not in name)


def _law(layer: SokaLayer, adapter: str) -> Iterator[tuple[str, nn.Parameter, float, bool]]:
    """(factor, parameter, multiplier, repeats) of one adapter of a layer; of what its form adds, the factor it is like.

    `repeats`: it is the size of Left and Right over again, that of terms which start small.

    Zeros have no size. A factor of zeros counts as large as the other one, and sigmas of zeros as small terms of a
    weight that keeps its inputs' size: a module may start from a delta of zero.

    Raises:
        CheckpointError: the adapter was never loaded.
        PlanError: the factors have lost their shapes (FSDP 1, ZeRO 3).
    """
    left, right = layer.soka_left[adapter], layer.soka_right[adapter]
    if left.ndim != 3 or right.ndim != 3:
        raise PlanError(
            f"{layer.module_name}: its factors are sharded as flat tensors, so that their sizes are not known",
            hint="FSDP 2 keeps shapes (fsdp_version: 2); otherwise make the optimizer before the model is sharded",
        )
    rank, shape = len(left), FactorShape(*left.shape[1:], *right.shape[1:])
    form = layer.form(adapter)
    terms = form.served(rank, subtracted=False)
    parameters = {part: getattr(layer, f"soka_{part}")[adapter] for part in PARTS}
    found = {part: float(_whole(value).float().square().mean().sqrt()) for part, value in parameters.items()}
    if zeros := not all(size > 0 for size in found.values()):
        layer.check_loaded(adapter)
        found["left"] = found["left"] or found["right"] or 1.0
        found["right"] = found["right"] or found["left"]
        found["sigma"] = found["sigma"] or SMALL / math.sqrt(shape.in_features) / (found["left"] * found["right"])
    sizes = {part: found[part] / (1.0 if part == "sigma" else math.sqrt(shape.spread)) for part in PARTS}
    start = layer.began(adapter)  # with sigmas of zero beside other modules' where nothing is subtracted
    small = zeros or (start is not None and bool(_whole(start.sigma).any()))
    pace = 1.0 if small else math.sqrt(SMALL)
    if not small and layer.mends(adapter):
        term = math.prod(found.values())
        pace = min(1.0, math.sqrt(SMALL * float(layer.float_weight().float().square().mean().sqrt()) / term))
    if (repeats := layer.sigma_repeats.get(adapter)) is None:
        theta = Factors(*(_whole(parameters[part]) for part in PARTS))
        repeats = sigma_repeats(theta, subtracted=small and not zeros, form=form)
    for part in PARTS:
        yield part, parameters[part], pace * sizes[part] / math.sqrt(terms), repeats and part == "sigma"
    for name, added in form.parts(rank, shape).items():
        parameter = getattr(layer, f"soka_{name}")[adapter]
        yield added.like, parameter, pace * sizes[added.like] / math.sqrt(added.terms), False


def sigma_repeats(theta: Factors, *, subtracted: bool, form: Form) -> bool:
    """Whether sigma only repeats the size of Left and Right: in terms that start small, unless the form names it.

    Args:
        theta: the factors at the start of training.
        subtracted: they are subtracted from what they become.
        form: what of them is trained.
    """
    small = subtracted or not (theta.left.any() and theta.right.any())
    return small and "train_factors" not in form.choices and bool((theta.sigma != 0).all())


def _whole(parameter: Tensor) -> Tensor:
    value = parameter.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def parameter_groups(
    model: nn.Module,
    lr: float,
    multipliers: Multipliers,
    weight_decay: float,
    decayed: Collection[str],
    other_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Groups of an optimiser: each factor alone, in the model's order, then what else needs gradients.

    A factor's group says for how many terms its rate is (`follow_terms`). What has a multiplier of 0 is frozen, and
    stays so when PEFT thaws the adapter.

    Args:
        multipliers: parameters with 0 are frozen.
        other_lr: of what is no factor; None is `lr`.
        decayed: names of the parameters that `weight_decay` is for. Factors with initial ones are left to
            `pull_to_initial`.

    Raises:
        FitError: nothing is left to train; nothing was frozen.
    """
    for layer in model.modules():
        if isinstance(layer, SokaLayer):
            for adapter in layer.adapter_names():
                layer.release(adapter)  # an optimiser before this one may have held it
    trained = list(_trained(model))
    rates, pulled = learning_rates(model, multipliers), _with_initial(model)
    groups: list[dict[str, Any]] = []
    others: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        decay = weight_decay if name in decayed and parameter not in pulled else 0.0
        if parameter in rates and rates[parameter] > 0:
            rate = lr * rates[parameter]
            groups.append({"params": [parameter], "lr": rate, "weight_decay": decay, "terms": len(parameter)})
        elif parameter.requires_grad and parameter not in rates:
            others.setdefault(decay, []).append(parameter)
    if not groups and not others:
        if rates:
            raise FitError("left_lr, right_lr and sigma_lr leave nothing to train", hint="raise one of them")
        raise FitError("no parameter of the model needs gradients", hint="make an adapter active: set_adapter(name)")
    for layer, adapter in trained:
        layer.hold(adapter, [name for name, store in layer.stores(adapter).items() if rates.get(store[adapter]) == 0])
    return groups + [
        {"params": found, "lr": lr if other_lr is None else other_lr, "weight_decay": decay}
        for decay, found in others.items()
    ]


def follow_terms(optimizer: torch.optim.Optimizer, scheduler: Any | None = None) -> None:
    """After terms were dropped: the rates that the law has for as many terms as are left; sizes are not measured anew.

    Args:
        optimizer: its groups that `parameter_groups` made for factors are changed, and no others.
        scheduler: of its rates, as torch's `LambdaLR`, whose `base_lrs` are those that it multiplies.
    """
    for number, group in enumerate(optimizer.param_groups):
        if "terms" not in group or group["terms"] == (left := len(group["params"][0])):
            continue
        ratio = math.sqrt(group["terms"] / left)
        group["terms"] = left
        for key in {"lr", "initial_lr"} & group.keys():
            group[key] = group[key] * ratio
        if scheduler is not None:
            scheduler.base_lrs[number] *= ratio


def _with_initial(model: nn.Module) -> dict[nn.Parameter, Callable[[], Tensor]]:
    """Trained factors that start from a delta of zero; with each, how to look its initial value up.

    It is looked up when it is needed: pruning, sharding and moving to a device replace tensors.
    """
    return {
        getattr(layer, f"soka_{part}")[name]: partial(getattr(layer, f"soka_{part}_initial").__getitem__, name)
        for layer, name in _trained(model)
        if layer.began(name) is not None
        for part in PARTS
    }


def pull_to_initial(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    weight_decay: float,
    decayed: Collection[str],
    share: Callable[[], float] = lambda: 1.0,
) -> bool:
    """Decoupled weight decay, at each step, of the factors that start from a delta of zero; whether there are any.

    Semantics: theta -= rate * weight_decay * share * (theta - theta0), before the step that the gradient asks for.

    Args:
        optimizer: has the groups that `parameter_groups` made.
        decayed: names of the parameters that `weight_decay` is for.
        share: of the weight decay at the step to come, where a schedule changes it.

    Raises at a step:
        PlanError: a factor and its initial one are sharded apart (FSDP 1).
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    starts = _with_initial(model)
    pulled: list[tuple[int, Callable[[], Tensor]]] = []
    for number, group in enumerate(optimizer.param_groups):
        parameter = group["params"][0]
        if weight_decay > 0 and parameter in starts and names[parameter] in decayed:
            pulled.append((number, starts[parameter]))

    @torch.no_grad()
    def pull(stepped: torch.optim.Optimizer, *_: Any) -> None:
        for number, start in pulled:
            group = stepped.param_groups[number]
            (parameter,) = group["params"]
            if parameter.grad is None:
                continue
            if (initial := start()).shape != parameter.shape:
                raise PlanError(
                    f"weight decay cannot meet a factor of {tuple(parameter.shape)} with its initial one of "
                    f"{tuple(initial.shape)}: they are sharded apart",
                    hint="FSDP 2 shards them alike (fsdp_version: 2); otherwise leave weight decay out",
                )
            parameter.add_(initial - parameter, alpha=float(group["lr"]) * weight_decay * share())

    if pulled:
        optimizer.register_step_pre_hook(pull)
    return bool(pulled)


def create_soka_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer] = torch.optim.AdamW,
    *,
    lr: float,
    left_lr: float = 1.0,
    right_lr: float = 1.0,
    sigma_lr: float | None = None,
    other_lr: float = 1e-3,
    weight_decay: float = 0.0,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """An optimiser for a model with SoKA adapters, with the rates of this module; for a training loop of your own.

    >>> import peft, soka_serve.peft
    >>> base = torch.nn.Sequential(torch.nn.Linear(12, 8, bias=False))
    >>> model = peft.get_peft_model(base, soka_serve.peft.SokaConfig(target_modules=["0"]))
    >>> optimizer = soka_serve.peft.create_soka_optimizer(model, lr=8.0)
    >>> len(optimizer.param_groups)
    2

    Args:
        model: its parameters that need gradients are trained; those that are no factors (`modules_to_save`) at
            `other_lr`.
        optimizer_cls: an optimiser that normalises gradients, as AdamW does.
        lr: how far a step moves the factors, as a share of themselves and of what was worked out for one term on one
            module (see this module).
        left_lr, right_lr, sigma_lr: multipliers on `lr`; a part with 0 is frozen, so call this before the model is
            wrapped (DDP). Sigma's is 0 by default where it only repeats the size of factors that are trained, else 1.
        weight_decay: of all trained parameters. It pulls a module's delta to zero: factors to the initial ones, where
            there are any. That part is decoupled from gradients, as AdamW's is, with every optimiser.
        kwargs: for `optimizer_cls`, such as `betas`.

    Raises:
        CheckpointError: an adapter's factors are still to be loaded, so that nothing tells their size.
        PlanError: the factors have lost their shapes (FSDP 1, ZeRO 3).
        FitError: nothing is left to train, or a number is negative or not finite; nothing was frozen.

    With the Trainer: `Trainer(..., optimizers=(optimizer, None))`. To go on with a saved state, make the optimiser of a
    fresh adapter of the same config, then load the factors, then the state: rates follow from the start.
    """
    rates = {"lr": lr, "left_lr": left_lr, "right_lr": right_lr, "sigma_lr": sigma_lr, "other_lr": other_lr}
    for name, value in {**rates, "weight_decay": weight_decay}.items():
        if value is not None and not 0 <= value < math.inf:
            raise FitError(f"{name}: expected a finite number from 0; got {value}")
    names = [name for name, _ in model.named_parameters()]
    multipliers = {"left": left_lr, "right": right_lr, "sigma": sigma_lr}
    optimizer = optimizer_cls(parameter_groups(model, lr, multipliers, weight_decay, names, other_lr), **kwargs)
    pull_to_initial(optimizer, model, weight_decay, names)
    return optimizer
