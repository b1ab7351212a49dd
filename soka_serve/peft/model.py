"""The tuner: finds the target modules of a model and replaces them by `SokaLinear`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from soka_serve.errors import CheckpointError, PlanError
from soka_serve.peft.config import SokaConfig
from soka_serve.peft.layer import KBIT_BACKENDS, SokaLayer, SokaLinear, find_backend
from soka_serve.peft.registration import PREFIX
from soka_serve.shapes import FactorShape, balanced_shape, check_shape


class SokaModel(BaseTuner):  # type: ignore[misc]
    """A model with SoKA adapters on its linear layers; made by `peft.get_peft_model(model, SokaConfig(...))`.

    Raises (on creation and when an adapter is added):
        PlanError: a target is not a linear layer, a factor shape does not fit, or `soka_modules` names a module that
            is not there. All of them are named, and nothing has been replaced yet.
    """

    prefix = PREFIX
    tuner_layer_cls = SokaLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter. Works on a copy of its config, which then records the ranks and shapes in `soka_modules`."""
        config = copy.deepcopy(self.peft_config[adapter_name])
        self.peft_config[adapter_name] = config
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config.mark_built()

    @staticmethod
    def _check_target_module_exists(peft_config: SokaConfig, key: str) -> Any:
        if peft_config.is_loading:
            return key in peft_config.soka_modules
        return BaseTuner._check_target_module_exists(peft_config, key)

    def _prepare_model(self, peft_config: SokaConfig, model: nn.Module) -> None:
        """Check every target before the first one is replaced."""
        _maybe_include_all_linear_layers(peft_config, model)
        problems, found = [], set()
        inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        for name, module in model.named_modules():
            if not name or name.startswith(inside) or not self._check_target_module_exists(peft_config, name):
                continue
            found.add(name)
            base = _base_of(module)
            problem = _unsupported(base)
            if problem is not None:
                problems.append(f"{name}: {problem}")
                continue
            try:
                _rank_and_shape(peft_config, name, base)
            except PlanError as error:  # it names the module itself
                problems.append(error.message)
        strangers = sorted(set(peft_config.soka_modules) - found)
        if strangers:
            problems.append(f"soka_modules names modules that the model lacks or that are not targeted: {strangers}")
        if problems:
            raise PlanError("\n".join(problems), hint="target linear layers, such as q_proj or down_proj")

    def _create_and_replace(
        self,
        peft_config: SokaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        rank, shape = _rank_and_shape(peft_config, current_key, _base_of(target))
        spec = {
            "rank": rank,
            "shape": shape,
            "init": peft_config.init_soka_weights,
            "initial": peft_config.soka_initial,
            "seed": peft_config.seed,
            "inference_mode": peft_config.inference_mode,
        }
        if isinstance(target, SokaLinear):
            target.update_layer(adapter_name, **spec)
            layer = target
        else:
            layer = SokaLinear(target, adapter_name, module_name=current_key, **spec)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)  # a further adapter is not trained unless it is made active
            self._replace_module(parent, target_name, layer, target)
        peft_config.soka_modules[current_key] = {"rank": len(layer.soka_sigma[adapter_name]), "shape": list(shape)}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SokaConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's hook between reading an adapter file and filling the model: checks it whole, all problems at once.

        A file with another number of terms than the model (terms were pruned before it was saved) resizes the model's
        parameters in place; they keep their identity, so an optimizer that holds them stays right.

        Raises:
            CheckpointError: factors missing or unknown, of the wrong shape, or not finite.
        """
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        problems = []
        expected: set[str] = set()
        for path, layer in model.named_modules():
            if not isinstance(layer, SokaLinear) or adapter_name not in layer.soka_left:
                continue
            keys = {
                part: f"{path.replace('_fsdp_wrapped_module.', '')}.{part}.{adapter_name}"
                for part in (*layer.adapter_layer_names, *layer.other_param_names)
                if adapter_name in getattr(layer, part)
            }
            expected |= set(keys.values())
            values = {part: remapped[key] for part, key in keys.items() if key in remapped}
            missing = sorted(set(keys) - set(values))
            if missing:
                problems.append(f"{layer.module_name}: missing {', '.join(missing)}")
                continue
            problems += _check_values(layer, adapter_name, values)
        unknown = sorted(key for key in remapped if f".{PREFIX}" in key and key not in expected)
        if unknown:
            problems.append(f"tensors that the adapter's config does not name: {', '.join(unknown[:5])}")
        if problems:
            raise CheckpointError(
                "the adapter's weights do not fit its config:\n" + "\n".join(f"  {line}" for line in problems),
                hint="the file is damaged, or belongs to another adapter_config.json",
            )
        for path, layer in model.named_modules():
            if isinstance(layer, SokaLinear) and adapter_name in layer.soka_left:
                key = f"{path.replace('_fsdp_wrapped_module.', '')}.soka_sigma.{adapter_name}"
                rank = len(remapped[key])
                if rank != len(layer.soka_sigma[adapter_name]):
                    layer.resize(adapter_name, rank)
                    config.soka_modules[layer.module_name]["rank"] = rank
        return remapped


def _check_values(layer: SokaLinear, adapter: str, values: dict[str, Tensor]) -> list[str]:
    """What is wrong with one module's tensors, by part name. The number of terms may differ from the model's."""
    problems = []
    rank = len(values["soka_sigma"]) if values["soka_sigma"].ndim == 1 else -1
    for part, value in values.items():
        want = (rank, *getattr(layer, part)[adapter].shape[1:])
        if tuple(value.shape) != want or rank < 1:
            problems.append(f"{layer.module_name}: {part} is {tuple(value.shape)}, expected {want}")
        elif not bool(torch.isfinite(value).all()):
            problems.append(f"{layer.module_name}: {part} has values that are not finite")
    return problems


def _base_of(module: nn.Module) -> nn.Module:
    """The plain layer under a module that may be adapted already."""
    return module.base_layer if isinstance(module, SokaLinear) else module


def _unsupported(module: nn.Module) -> str | None:
    """Why a module cannot be adapted; None where it can."""
    if isinstance(module, BaseTunerLayer):
        return f"already adapted by another PEFT method ({type(module).__module__}); mixing methods is not supported"
    if not isinstance(module, nn.Linear):
        return f"a {type(module).__name__} cannot be adapted, only torch.nn.Linear and bitsandbytes 8 and 4 bit can"
    try:
        backend = find_backend(module)
    except ValueError as error:  # torchao without its config
        return f"quantised layers of this kind cannot be adapted ({error})"
    if backend is not None and backend.backend_name not in KBIT_BACKENDS:
        return f"layers quantised by {backend.backend_name} cannot be adapted, only bitsandbytes 8 and 4 bit"
    return None


def _rank_and_shape(config: SokaConfig, name: str, module: nn.Module) -> tuple[int, FactorShape]:
    """Rank and factor shape of one module: what `soka_modules` says, else the config's. PlanError if it cannot be."""
    if not isinstance(module, nn.Linear):
        raise PlanError(f"{name}: {_unsupported(module)}")
    spec = config.soka_modules.get(name, {})
    shape = spec.get("shape", config.shape)
    if shape == "balanced":
        fitted = balanced_shape(module.out_features, module.in_features)
    else:
        fitted = check_shape(FactorShape(*shape), module.out_features, module.in_features, module=name)
    return int(spec.get("rank", config.r)), fitted
