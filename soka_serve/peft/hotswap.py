"""Put another adapter in the place of a loaded one. PEFT's own `hotswap_adapter` serves LoRA only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from torch import Tensor

from soka_serve.adapter.format import KEY_PREFIX
from soka_serve.errors import CheckpointError, first_ten, name_some
from soka_serve.kron.shapes import FactorShape
from soka_serve.peft.config import SokaConfig
from soka_serve.peft.errors import FitError
from soka_serve.peft.factors import soka_layers
from soka_serve.peft.loading import check_values, modules_of, other_bits
from soka_serve.peft.parts import PARTS, PREFIX
from soka_serve.trained import TENSORS


def hotswap_adapter(model: Any, directory: str, adapter_name: str = "default", **download: Any) -> None:
    """Replace the factors of adapter `adapter_name` by those in a directory; layers, name and activity stay.

    Ranks and factor shapes may differ, the modules may not. Parameters keep their identity; a compiled model is
    compiled again only where a shape changes.

    Args:
        model: the PeftModel.
        directory: an adapter's folder, or its hub id.
        download: PEFT's options for the hub, such as `revision`.

    Raises:
        FitError: no such adapter, other modules, or the adapter is merged; nothing was changed.
        CheckpointError: factors missing, of the wrong shape, or not finite, or other tensors (`modules_to_save`)
            missing, unknown or of another shape; nothing was changed.
    """
    config: Any = model.peft_config.get(adapter_name)
    layers = soka_layers(model, adapter_name)
    if not isinstance(config, SokaConfig) or not layers:
        raise FitError(f"there is no SoKA adapter {adapter_name!r} to be replaced")
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise FitError(f"adapter {adapter_name!r} is merged", hint="call unmerge_adapter() first")
    incoming = SokaConfig.from_pretrained(directory, **download)
    tensors = load_peft_weights(directory, device="cpu", **download)
    other = set(modules_of(tensors)) ^ set(layers)
    if other:
        raise FitError(f"{directory}: the adapter is for other modules: {name_some(sorted(other))}")
    if added := sorted(key for key in tensors if key.endswith(tuple(f".{PREFIX}{name}" for name in TENSORS))):
        raise FitError(
            f"{directory}: an adapter in training, with {name_some(added)} beside its factors",
            hint="write it as a finished one first: `soka-serve export`",
        )
    own, theirs = ({*(c.modules_to_save or ())} for c in (config, incoming))
    if own != theirs:
        raise FitError(
            f"{directory}: the adapter has {name_some(sorted(theirs)) or 'no modules'} in modules_to_save, and "
            f"{adapter_name!r} has {name_some(sorted(own)) or 'none'}",
            hint="delete the adapter, and load this one with load_adapter",
        )
    kinds = ("", "_initial") if incoming.soka_initial else ("",)
    stores = [f"{PREFIX}{part}{kind}" for kind in kinds for part in PARTS]
    if wrong := [p for layer in layers.values() if (p := other_bits(incoming, layer)) is not None]:
        raise FitError(f"{directory}: {wrong[0]}")
    problems = _misfits(model, adapter_name, tensors)
    for name, layer in layers.items():
        values = {store: tensors[key] for store in stores if (key := f"{KEY_PREFIX}{name}.{store}") in tensors}
        missing = sorted(set(stores) - set(values))
        if missing:
            problems.append(f"{name}: missing {', '.join(missing)}")
            continue
        shape = FactorShape(*values[stores[0]].shape[1:], *values[stores[1]].shape[1:])
        if (shape.out_features, shape.in_features) != (layer.out_features, layer.in_features):
            size = (layer.out_features, layer.in_features)
            problems.append(f"{name}: factor shape {list(shape)} does not fit the weight {size}")
        problems += check_values(name, list(shape), values)
    if problems:
        raise CheckpointError(f"{directory}: " + "; ".join(first_ten(problems)), hint="nothing was changed")
    for layer in layers.values():
        layer.drop_initial(adapter_name)
        layer.note_bits(adapter_name, incoming.soka_quantize)
        layer.set_form(adapter_name, incoming.form_of(layer.module_name))
        if incoming.soka_initial:
            for part in PARTS:
                value = getattr(layer, f"{PREFIX}{part}")[adapter_name]
                getattr(layer, f"{PREFIX}{part}_initial")[adapter_name] = value.detach().clone()
    config.soka_quantize = incoming.soka_quantize
    config.soka_initial, config.init_soka_weights, config.shapes_are_open = incoming.soka_initial, False, True
    try:
        set_peft_model_state_dict(model, tensors, adapter_name=adapter_name)
    finally:
        config.shapes_are_open = False


def _misfits(model: Any, adapter_name: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with the names and shapes of tensors that are no factors: those of whole modules."""

    def others(found: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        return {key: tuple(t.shape) for key, t in found.items() if not key.rpartition(".")[2].startswith(PREFIX)}

    own = others(get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False))
    # Embeddings lie in files of adapters whose base got further tokens.
    known = own | others(dict(model.named_parameters()))
    theirs = others(tensors)
    wrong = [f"{key}: missing" for key in own if key not in theirs]
    wrong += [f"{key}: there is no such tensor here" for key in theirs if key not in known]
    return wrong + [
        f"{key} is {shape}, expected {known[key]}"
        for key, shape in theirs.items()
        if key in known and shape != known[key]
    ]
