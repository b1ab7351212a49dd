"""Loads an adapter directory into vLLM's LoRAModel, after checking all of it against the model's layers."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights

from soka_serve.adapter.format import PEFT_TYPE
from soka_serve.adapter.raw import read_raw
from soka_serve.adapter.stacks import find_stacks
from soka_serve.errors import SokaError, first_ten, is_shown, printable
from soka_serve.io.budget import ReadingBudget
from soka_serve.kron import Factors
from soka_serve.kron.shapes import FactorShape
from soka_vllm import compat
from soka_vllm.arena import too_large
from soka_vllm.layers import KroneckerMixin
from soka_vllm.lycoris import KIND as LYCORIS
from soka_vllm.lycoris import unflatten
from soka_vllm.plans import Plan, make_plan, plans_of, refuse_not_finite
from soka_vllm.readers import READERS, SokaFiles, look_at_soka, within
from soka_vllm.store import READ_RESULT, ReadResult

_logger = logging.getLogger("vllm.soka")


def load_adapter(
    directory: Path, kind: str, lora_request: Any, manager: Any, dtype: torch.dtype, budget: ReadingBudget | None = None
) -> Any:
    """Read a Kronecker adapter as a vLLM LoRAModel.

    Each module's `lora_a` is Left (r, m, n) with sigma multiplied in and `lora_b` is Right (r, p, q), both on the CPU
    in `dtype`; three dimensions tell them from LoRA's two.

    Args:
        directory: the adapter.
        kind: its peft_type, one of READERS.
        lora_request: vLLM's request; its integer id goes into the model.
        manager: vLLM's LoRAModelManager, whose layers the adapter must fit.
        dtype: of the factors in the slots.
        budget: what reading it may take.

    Raises:
        ValueError: everything that is wrong with the adapter, or that does not fit the model.
    """
    budget = budget or ReadingBudget()
    plans = plans_of(manager)
    try:
        raw = read_raw(directory, budget) if kind == PEFT_TYPE and plans.alone else None
        plan = plans.find(raw.layout) if raw is not None else None
        if plan is not None:
            budget.take_values(directory, plan.stacks.values)
            return _planned_model(plan, directory, lora_request, dtype)
        files = READERS[kind](directory, budget) if raw is None else look_at_soka(directory, budget, raw)
        own, places = files.shapes, places_of(manager)
        names = _served_names(kind, own, places, manager)
        # What does not fit the model is refused before its values are read.
        if not files.problems:
            _check_layers({name: own[names[name]] for name in names}, places, manager)
        if raw is not None and isinstance(files, SokaFiles) and (stacks := find_stacks(files.files)) is not None:
            plan = make_plan(stacks, names, places)
            if plan is not None:
                model = _planned_model(plan, directory, lora_request, dtype)
                plans.keep(raw.layout, plan)
                return model
        found = files.read()
    except SokaError as error:
        raise ValueError(within(directory, error)) from error
    adapter = {name: found[names[name]] for name in names}
    return _model_of(adapter, kind, lora_request, places, dtype)


def _planned_model(plan: Plan, directory: Path, lora_request: Any, dtype: torch.dtype) -> Any:
    """An adapter whose layout was checked."""
    factors, fingerprint, nbytes = plan.load(directory, dtype)
    weights = {}
    for planned in plan.planned:
        for name, _ in planned.places:
            left, right = factors[name]
            weights[name] = LoRALayerWeights(name, planned.kind.rank, planned.kind.rank, left, right, scaling=1)
    _log_loaded(PEFT_TYPE, lora_request, weights, f"{nbytes} bytes in {dtype}")
    model = LoRAModel(lora_request.lora_int_id, plan.ranks[1], weights)
    setattr(model, READ_RESULT, ReadResult(fingerprint=fingerprint, nbytes=nbytes))
    return model


def _model_of(
    adapter: Mapping[str, Factors],
    kind: str,
    lora_request: Any,
    places: Mapping[str, tuple[Any, int]],
    dtype: torch.dtype,
) -> Any:
    """An adapter of which each module's terms were read, by the served model's names."""
    weights = {}
    tensors: dict[str, torch.Tensor] = {}
    values, room, here = 0, None, 0
    for name, factors in adapter.items():
        left, right = (factors.left * factors.sigma[:, None, None]).to(dtype), factors.right.to(dtype)
        layer, index = places.get(name, (None, 0))
        here += layer is not None
        if layer is not None and (arranged := layer.arranged(index, left, right)) is not None:
            left, right, own = arranged
            values += own.numel()
        else:
            right = factors.right.to(dtype, copy=True)  # else all of the file stays in memory for it
            if layer is not None:
                room = layer.slot_values
                values += sum(part.left.numel() + part.right.numel() for _, part in layer.parts(index, left, right))
        tensors |= {f"{name}: Left": left, f"{name}: Right": right}
        weights[name] = LoRALayerWeights(name, factors.rank, factors.rank, left, right, scaling=1)
    refuse_not_finite(tensors, dtype)
    if room is not None and values > room:
        raise ValueError(too_large(values, room))
    size = values * dtype.itemsize
    _log_loaded(kind, lora_request, weights, f"on this rank {here} of them with {size} bytes in {dtype}")
    return LoRAModel(lora_request.lora_int_id, max(weight.rank for weight in weights.values()), weights)


def _log_loaded(kind: str, lora_request: Any, weights: Mapping[str, Any], size: str) -> None:
    ranks = [weight.rank for weight in weights.values()]
    _logger.info(
        "%s adapter %r from %s: %d modules, ranks %d to %d, %s",
        *(kind, lora_request.lora_name, lora_request.lora_path, len(weights), min(ranks), max(ranks), size),
    )


def _served_names(kind: str, own: Iterable[str], places: Mapping[str, object], manager: Any) -> dict[str, str]:
    """Map from the served model's module names to the adapter's.

    Of a multimodal model also those that the language model's modules have in a checkpoint of it alone
    (model.layers.0...), as vLLM from 0.33 on takes LoRA's.

    Raises:
        ValueError: two of the adapter's modules are one of the served model's.
    """
    elsewhere = compat.modules_elsewhere(manager.model)
    if kind == LYCORIS:
        return unflatten({name: name for name in own}, places, elsewhere)
    found: dict[str, str] = {}
    twice = []
    for name in own:
        served = _served_name(name, places, elsewhere, manager)
        if served in found:
            twice.append(f"{printable(found[served])} and {printable(name)} are both the served model's {served}")
        found[served] = name
    if twice:
        raise ValueError("\n".join(first_ten(twice)))
    return found


def _served_name(name: str, places: Mapping[str, object], elsewhere: tuple[str, ...], manager: Any) -> str:
    """What the served model calls a module of an adapter; where it has none, the name that an error shows."""
    found = compat.served_name(manager.model, name)
    return next(
        (n for n in (found, *_text_names(name, manager)) if n in places or f"{n}.".startswith(elsewhere)), found
    )


def taken_name(name: str, places: Mapping[str, object], manager: Any) -> str:
    """The served model's name of a module that vLLM takes from a LoRA adapter by this one; where it has none, this."""
    text = _text_names(name, manager) if compat.text_names_are_taken(manager) else ()
    return next((n for n in (name, *text) if n in places), name)


def _text_names(name: str, manager: Any) -> tuple[str, ...]:
    """What a multimodal model may call a module that has this name in a checkpoint of its language model alone."""
    prefix = compat.language_model_prefix(manager)
    return () if prefix is None else (prefix + name, prefix + name.removeprefix("model."))


def check_lora(model: Any, manager: Any) -> None:
    """Hold an ordinary LoRA adapter, as vLLM has read it, against the layers: vLLM leaves out what it cannot place.

    Where vLLM itself renames modules or leaves some out on purpose (experts, towers of multimodal models, pooling
    models) single modules are not checked; of a multimodal model at least one must be there.

    Args:
        model: vLLM's LoRAModel, not yet packed.
        manager: vLLM's LoRAModelManager.

    Raises:
        ValueError: all modules that the served model has no layer for, or whose matrices do not fit or are not finite.
    """
    places, elsewhere = places_of(manager), compat.modules_elsewhere(manager.model)
    if manager.supports_mm and not manager._is_moe and not manager.is_pooling_model:
        _check_any(model.loras, places, elsewhere, manager)
    if manager._is_moe or manager.supports_mm or manager.is_pooling_model:
        return
    problems: list[str] = []
    for name, weights in model.loras.items():
        if f"{name}.".startswith(elsewhere):
            continue
        down, up = weights.lora_a, weights.lora_b
        if name not in places:
            problems.append(_no_layer(name, places, manager) if is_shown(problems) else name)
        elif down is None or up is None:
            problems.append(f"{printable(name)}: lora_{'A' if down is None else 'B'} is missing")
        elif not bool(down.isfinite().all() and up.isfinite().all()):
            problems.append(f"{printable(name)}: values are not finite")
        elif isinstance(places[name][0], KroneckerMixin):
            layer, index = places[name]
            shape = (up.shape[0], down.shape[1])
            if shape != layer.shards.shapes[index] or up.shape[1] != down.shape[0]:
                problems.append(
                    f"{name}: lora_B {tuple(up.shape)} and lora_A {tuple(down.shape)}, "
                    f"the served weight is {layer.shards.shapes[index]}"
                )
    if problems:
        raise ValueError("\n".join(first_ten(problems)))


def _check_any(names: Iterable[str], places: Mapping[str, object], elsewhere: tuple[str, ...], manager: Any) -> None:
    """Refuse a LoRA that would change nothing, such as one with the names of a checkpoint of the language model alone
    before vLLM 0.33."""
    taken = compat.text_names_are_taken(manager)
    for name in names:
        own = (name, *(_text_names(name, manager) if taken else ()))
        if any(n in places or f"{n}.".startswith(elsewhere) for n in own):
            return
    problems = [_no_layer(name, places, manager) for name in sorted(names)[:10]]
    raise ValueError("\n".join(problems) or "the adapter has no modules")


def _no_layer(name: str, places: Mapping[str, object], manager: Any) -> str:
    close = difflib.get_close_matches(name, places, n=1)
    near = f"; close is {close[0]}" if close else ""
    targets = manager.lora_config.target_modules
    left_out = f"; --lora-target-modules is {' '.join(targets)}" if targets else ""
    return f"{printable(name)}: no layer of the served model that takes adapters{near}{left_out}"


def places_of(manager: Any) -> dict[str, tuple[Any, int]]:
    """Map from a checkpoint's module name to the vLLM layer that takes its adapters and the index within that layer.

    The first one of a module that the layer holds several times, see `compat.shards_of`.
    """
    places = {}
    for name, layer in manager.modules.items():
        parts = manager.packed_modules.get(name, [name])
        places.update({part: (layer, parts.index(part)) for part in parts})
    return places


def _check_layers(shapes: Mapping[str, FactorShape], places: Mapping[str, tuple[Any, int]], manager: Any) -> None:
    """Check that each adapted module is a layer, or a slice of one, that takes Kronecker factors of its shape.

    A rank of a pipeline answers for its own layers; what lies inside a layer that it knows to be another's is left to
    that rank.

    Raises:
        ValueError: all that do not fit.
    """
    problems: list[str] = []
    elsewhere = compat.modules_elsewhere(manager.model)
    for name, shape in shapes.items():
        if f"{name}.".startswith(elsewhere):
            continue
        layer, index = places.get(name, (None, 0))
        if layer is None:
            problems.append(_no_layer(name, places, manager) if is_shown(problems) else name)
        elif not isinstance(layer, KroneckerMixin):
            problems.append(f"{name}: {type(layer).__name__} takes no Kronecker adapter; only attention and MLP do")
        elif (shape.out_features, shape.in_features) != layer.shards.shapes[index]:
            problems.append(
                f"{name}: factors {list(shape)} make a {(shape.out_features, shape.in_features)} delta, "
                f"the served weight is {layer.shards.shapes[index]}"
            )
    if problems:
        raise ValueError("\n".join(first_ten(problems)))
