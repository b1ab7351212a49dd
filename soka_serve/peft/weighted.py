"""`add_weighted_adapter`: a sum of adapters as one adapter. Exact, because terms of one factor shape concatenate."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper

from soka_serve.errors import first_ten
from soka_serve.kron import Factors, recompress, stack_terms
from soka_serve.peft.errors import FitError
from soka_serve.peft.layer import SokaLayer


def add_weighted_adapter(model: Any, adapters: list[str], weights: list[float], adapter_name: str) -> None:
    """Add the adapter whose delta is the sum of weights[i] * delta of adapters[i], in every module.

    A module that only some of the adapters have gets those. More terms than a delta of its shape can have are
    recompressed, which is exact to rounding. The new adapter is not active, and has no initial factors.

    Args:
        model: the tuner (`SokaModel`).

    Raises:
        FitError: unknown adapters, another number of weights, adapters that differ in a module's factor shape or that
            have whole modules trained (`modules_to_save`).
    """
    _check(model, adapters, weights, adapter_name)
    sums: dict[str, Factors] = {}
    for layer in model.modules():
        if isinstance(layer, SokaLayer) and set(adapters) & set(layer.adapter_names()):
            sums[layer.module_name] = _sum(layer, adapters, weights)
    config = copy.deepcopy(model.peft_config[adapters[0]])
    config.forget_building()
    config.init_soka_weights, config.soka_initial, config.inference_mode = False, False, True
    config.soka_trained = {}
    config.soka_quantize = next((bits for a in adapters if (bits := model.peft_config[a].soka_quantize)), None)
    config.target_modules, config.exclude_modules, config.layers_to_transform = set(sums), None, None
    config.layers_pattern, config.modules_to_save, config.rank_pattern = None, None, {}
    config.r = max(factors.rank for factors in sums.values())
    config.soka_modules = {name: {"rank": f.rank, "shape": list(f.shape)} for name, f in sums.items()}
    model.peft_config[adapter_name] = config
    try:
        model.inject_adapter(model.model, adapter_name)
        for layer in model.modules():
            if isinstance(layer, SokaLayer) and layer.module_name in sums and adapter_name in layer.soka_left:
                layer.set_factors(adapter_name, sums[layer.module_name], None)
    except Exception:
        model.delete_adapter(adapter_name)
        raise


def _sum(layer: SokaLayer, adapters: list[str], weights: list[float]) -> Factors:
    """The sum on one layer; as many terms as all adapters together, or as the factor shape can have."""
    with torch.no_grad():
        terms = [layer.delta(name, layer._exact_dtype()) for name in adapters if name in layer.soka_left]
        signs = [weight for name, weight in zip(adapters, weights, strict=True) if name in layer.soka_left]
        total = stack_terms(*terms, signs=signs)
        return recompress(total)[0] if total.rank > total.shape.max_rank else total


def _check(model: Any, adapters: list[str], weights: list[float], adapter_name: str) -> None:
    unknown = [name for name in adapters if name not in model.peft_config]
    problems = [f"Adapter {name} does not exist" for name in unknown]
    if adapter_name in model.peft_config:
        problems.append(f"Adapter {adapter_name} exists already")
    if not adapters or len(set(adapters)) != len(adapters):
        problems.append(f"adapters must name each adapter once, got {adapters}")
    if len(weights) != len(adapters):
        problems.append(f"{len(adapters)} adapters, but {len(weights)} weights")
    for layer in model.modules():
        if isinstance(layer, SokaLayer):
            shapes = {tuple(layer.spec(name)["shape"]) for name in adapters if name in layer.soka_left}
            if len(shapes) > 1:
                problems.append(f"{layer.module_name}: the adapters have different factor shapes, {sorted(shapes)}")
        if isinstance(layer, ModulesToSaveWrapper) and any(name in layer.modules_to_save for name in adapters):
            problems.append("an adapter trains whole modules (modules_to_save), which cannot be summed")
    if problems:
        raise FitError("cannot add a weighted adapter: " + "; ".join(first_ten(problems)))
