"""Match a config or an adapter file with a model: which modules are adapted, with what rank and factor shape.

Everything is checked before anything is changed, and all problems come in one message.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from soka_serve.adapter.format import KEY_PREFIX
from soka_serve.errors import CheckpointError, PlanError, first_ten, name_some
from soka_serve.kron.shapes import FactorShape, balanced_shape, check_shape
from soka_serve.peft.config import SokaConfig
from soka_serve.peft.errors import FitError
from soka_serve.peft.layer import SokaLinear
from soka_serve.peft.merging import KBIT_BACKENDS, find_backend, weight_size
from soka_serve.peft.parts import PREFIX, part_of
from soka_serve.trained import PLAIN, Form

log = logging.getLogger(__name__)

_NF4 = "nf4"  # the kind of 4 bits that `base.quantize` has


def plan_modules(config: SokaConfig, model: nn.Module, matches: Callable[[str], Any], *, nested: bool = False) -> None:
    """Check every module that an adapter is for. Of an adapter to be loaded, `soka_modules` gets this model's names.

    Args:
        config: its `target_modules` are resolved already.
        model: the base, which may have adapters.
        matches: whether a module is a target, by its name.
        nested: other PEFT methods may have adapted the same modules.

    Raises:
        FitError: modules that cannot be adapted, factor shapes that do not fit, names that are not in the model.
    """
    modules = dict(model.named_modules())
    inside = tuple(f"{name}." for name, module in modules.items() if isinstance(module, BaseTunerLayer))
    names = [name for name in modules if name and not name.startswith(inside)]
    if config.is_loading:
        _rename(config, model, [name for name in names if unsupported(modules[name], nested=nested) is None], matches)
    targets = [name for name in names if (name in config.soka_modules if config.is_loading else matches(name))]
    problems = [] if config.is_loading else _fused_experts(config, model, alone=not targets)
    for name in targets:
        problem = unsupported(modules[name], nested=nested)
        try:
            if problem is not None:
                raise PlanError(f"{name}: {problem}")
            if (problem := other_bits(config, modules[name]) or config.form_problem_of(name)) is not None:
                raise PlanError(f"{name}: {problem}")
            rank_and_shape(config, name, modules[name])
        except PlanError as error:  # it names the module itself
            problems.append(error.message)
    strangers = sorted(set(config.soka_modules) - set(targets))
    if strangers:
        listed = name_some([repr(name) for name in strangers])
        problems.append(f"soka_modules names modules that the model lacks or that are not targeted: [{listed}]")
    if problems:
        raise FitError("\n".join(first_ten(problems)), hint="target linear layers, such as q_proj or down_proj")


def _fused_experts(config: SokaConfig, model: nn.Module, *, alone: bool) -> list[str]:
    """Targets that are parameters of a mixture's experts, all in one tensor: an error where they are the only ones.

    Beside other targets they are named in the log, as the same name may be meant for a linear layer.
    """
    targets = config.target_modules
    ends = () if targets is None or isinstance(targets, str) else tuple(f".{target}" for target in targets)
    found = [name for name, value in model.named_parameters() if value.ndim == 3 and f".{name}".endswith(ends)]
    if not ends or not found:
        return []
    text = f"the experts of a mixture in one tensor cannot be adapted: {name_some(found)}"
    if alone:
        return [text]
    log.warning("%s", text)
    return []


def unsupported(module: nn.Module, *, nested: bool = False) -> str | None:
    """Why a module cannot be adapted; None where it can."""
    if isinstance(module, BaseTunerLayer):
        if not isinstance(module, SokaLinear) and not nested:
            kind = type(module).__module__
            return f"already adapted by another PEFT method ({kind}); only PeftMixedModel mixes methods"
        module = module.get_base_layer()
    if not isinstance(module, nn.Linear | Conv1D):
        return (
            f"a {type(module).__name__} cannot be adapted, only torch.nn.Linear, bitsandbytes 8 and 4 bit and "
            "transformers' Conv1D can"
        )
    try:
        backend = find_backend(module)
    except ValueError as error:  # torchao without its config
        return f"quantised layers of this kind cannot be adapted ({error})"
    if backend is not None and backend.backend_name not in KBIT_BACKENDS:
        return f"layers quantised by {backend.backend_name} cannot be adapted, only bitsandbytes 8 and 4 bit"
    return None


def other_bits(config: SokaConfig, module: nn.Module) -> str | None:
    """Why an adapter that adds to a base in bits is wrong on a module; None where it is right."""
    if config.soka_quantize is None:
        return None
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    backend = find_backend(base)
    kind = getattr(getattr(base.weight, "quant_state", None), "quant_type", _NF4)
    if backend is not None and backend.backend_name == f"bnb {config.soka_quantize}" and kind == _NF4:
        return None
    held = "not quantised" if backend is None else f"{backend.backend_name}{'' if kind == _NF4 else f', {kind}'}"
    return (
        f"the adapter adds to a base in {config.soka_quantize} (bitsandbytes, 4 bits as {_NF4}), the layer is {held}; "
        "open the base so, or merge the adapter with `soka-serve merge`, which knows"
    )


def rank_and_shape(config: SokaConfig, name: str, module: nn.Module) -> tuple[int, FactorShape]:
    """Rank and factor shape of one module: what `soka_modules` says, else the config. PlanError if it cannot be."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    out_features, in_features = weight_size(base)
    shape = config.soka_modules.get(name, {}).get("shape", config.shape)
    if shape == "balanced":
        return config.rank_of(name), balanced_shape(out_features, in_features)
    return config.rank_of(name), check_shape(FactorShape(*shape), out_features, in_features, module=name)


# --- modules that have another name than when the adapter was made ---------------------------------------------------


def _rename(config: SokaConfig, model: nn.Module, names: list[str], matches: Callable[[str], Any]) -> None:
    """Give `soka_modules` the names that its modules have in this model; the file's tensors are checked against them.

    Where no name is known here at all, the config's targets say which modules are adapted, as for PEFT's own methods,
    and the file says rank and shape (`config.shapes_are_open`).
    """
    known, old = set(names), config.soka_modules
    new = {name: name for name in old if name in known}
    missing = [name for name in old if name not in known]
    mapping: Mapping[str, str] = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    for name in missing:
        renamed = _apply(mapping, name)
        if renamed in known:
            new[name] = renamed
    if not new:
        new = _move(list(old), known)
    if not new:
        found = [name for name in names if matches(name)]
        if found:
            config.shapes_are_open = True
            config.soka_modules = {name: {} for name in found}
        return
    if len(set(new.values())) == len(new):
        config.soka_modules = {new.get(name, name): spec for name, spec in old.items()}


def _apply(mapping: Mapping[str, str], name: str) -> str:
    """A name after the first pattern that it matches, as PEFT renames keys."""
    for pattern, replacement in mapping.items():
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def _move(missing: list[str], free: set[str]) -> dict[str, str]:
    """New names when one leading path was exchanged for another in all of them; empty where that is not so.

    Numbers, which tell layers apart, stay; two ways to do it are none.

    >>> _move(["model.layers.0.q"], {"model.language_model.layers.0.q", "lm_head"})
    {'model.layers.0.q': 'model.language_model.layers.0.q'}
    """
    parts = missing[0].split(".")
    for kept in range(len(parts), 0, -1):
        end = ".".join(parts[-kept:])
        start = missing[0].removesuffix(end)
        found = []
        for name in free:
            if (name != end and not name.endswith(f".{end}")) or _has_number(start + name.removesuffix(end)):
                continue
            moved = {m: name.removesuffix(end) + m.removeprefix(start) for m in missing if m.startswith(start)}
            if len(moved) == len(missing) and set(moved.values()) <= free:
                found.append(moved)
        if found:
            return found[0] if len(found) == 1 else {}
    return {}


def _has_number(path: str) -> bool:
    return any(part.isdecimal() for part in path.split("."))


# --- tensors ---------------------------------------------------------------------------------------------------------


def modules_of(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """What `soka_modules` says of an adapter with these tensors (named as in its file); checks nothing else."""
    modules = {}
    for key, left in tensors.items():
        name, found, _ = key.rpartition(f".{PREFIX}left")
        right = tensors.get(f"{name}.{PREFIX}right")
        if found and key.endswith(found) and right is not None and left.ndim == right.ndim == 3:
            spec = {"rank": len(left), "shape": [*left.shape[1:], *right.shape[1:]]}
            modules[name.removeprefix(KEY_PREFIX)] = spec
    return modules


def fit_tensors(model: nn.Module, config: SokaConfig, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    """Check the tensors of an adapter (named as in the model) whole, then resize the model's parameters where need be.

    A file may have another number of terms than the model (terms were pruned before it was saved). Parameters are
    resized in place; they keep their identity, so an optimizer that holds them stays right. A finished adapter, which
    has no initial factors, can be put into a model that was made with some; the model then drops them.

    Raises:
        CheckpointError: factors missing or unknown, of the wrong shape, or not finite.
    """
    is_finished = config.init_soka_weights == "weights" and not any(f"_initial.{adapter}." in key for key in tensors)
    problems: list[str] = []
    expected: set[str] = set()
    fitting: list[tuple[SokaLinear, int, list[int]]] = []
    for path, layer in model.named_modules():
        if not isinstance(layer, SokaLinear) or adapter not in layer.soka_left:
            continue
        stores = layer.factor_names if is_finished else layer.stores(adapter)
        keys = {store: f"{clean(path)}.{store}.{adapter}.weight" for store in stores}
        expected |= set(keys.values())
        values = {store: tensors[key] for store, key in keys.items() if key in tensors}
        missing = sorted(set(keys) - set(values))
        if missing:
            problems.append(f"{layer.module_name}: missing {', '.join(missing)}")
            continue
        shape = _shape_of(layer, adapter, values, is_open=config.shapes_are_open)
        form = PLAIN if is_finished else layer.form(adapter)
        wrong = check_values(layer.module_name, shape, values, form) or _moved(layer.module_name, values, form)
        problems += wrong
        if not wrong:
            fitting.append((layer, len(values[f"{PREFIX}sigma"]), shape))
    unknown = sorted(key for key in tensors if key.rpartition(".")[2].startswith(PREFIX) and key not in expected)
    if unknown:
        problems.append(f"tensors that the adapter's config does not name: {name_some(unknown)}")
    if problems:
        raise CheckpointError(
            "the adapter's weights do not fit its config:\n  " + "\n  ".join(first_ten(problems)),
            hint="the file is damaged, or belongs to another adapter_config.json",
        )
    for layer, rank, shape in fitting:
        if is_finished:
            layer.drop_initial(adapter)
            config.soka_initial = False
        if layer.spec(adapter) | {"rank": rank, "shape": shape} != layer.spec(adapter):
            layer.resize(adapter, rank, shape)
    config.record({layer.module_name: layer.spec(adapter) for layer, *_ in fitting})


def clean(path: str) -> str:
    """A module's path without FSDP's wrapper, as the state dict has it."""
    return path.replace("_fsdp_wrapped_module.", "")


def _shape_of(layer: SokaLinear, adapter: str, values: Mapping[str, Tensor], *, is_open: bool) -> list[int]:
    """The factor shape that a layer's tensors must have: its own, or that of the file where that is to say it."""
    left, right = values[f"{PREFIX}left"], values[f"{PREFIX}right"]
    shape = [*left.shape[1:], *right.shape[1:]]
    if is_open and left.ndim == right.ndim == 3:
        m, n, p, q = shape
        if m * p == layer.out_features and n * q == layer.in_features:
            return shape
    own: list[int] = layer.spec(adapter)["shape"]
    return own


def _moved(module: str, values: Mapping[str, Tensor], form: Form) -> list[str]:
    """Left or Right that is not the initial one, although it is not trained: the two count as one and the same."""
    return [
        f"{module}: {PREFIX}{part} differs from its initial one, and the adapter here does not train it"
        for part in sorted(form.frozen & {"left", "right"})
        if (initial := values.get(f"{PREFIX}{part}_initial")) is not None
        and not torch.equal(values[f"{PREFIX}{part}"], initial)
    ]


def check_values(module: str, shape: list[int], values: Mapping[str, Tensor], form: Form = PLAIN) -> list[str]:
    """What is wrong with one module's tensors, by part name. The number of terms may differ from the model's."""
    problems = []
    sigma = values[f"{PREFIX}sigma"]
    rank = len(sigma) if sigma.ndim == 1 else -1
    sizes = form.sizes(rank, FactorShape(*shape))
    for store, value in values.items():
        want = sizes[part_of(store)]
        if tuple(value.shape) != want or rank < 1:
            problems.append(f"{module}: {store} is {tuple(value.shape)}, expected {want}")
        elif not bool(torch.isfinite(value).all()):
            problems.append(f"{module}: {store} has values that are not finite")
    return problems
