"""The tuner: finds the target modules of a model and replaces them by `SokaLinear`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule, _maybe_include_all_linear_layers, onload_layer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from soka_serve.adapter.format import KEY_PREFIX
from soka_serve.peft.config import SokaConfig
from soka_serve.peft.layer import SokaLayer, SokaLinear
from soka_serve.peft.loading import clean, fit_tensors, modules_of, plan_modules, rank_and_shape
from soka_serve.peft.merging import not_finite
from soka_serve.peft.mixed_batch import adapter_per_row
from soka_serve.peft.parts import PREFIX, file_key
from soka_serve.peft.weighted import add_weighted_adapter


class SokaModel(BaseTuner):  # type: ignore[misc]
    """A model with SoKA adapters on its linear layers; made by `peft.get_peft_model(model, SokaConfig(...))`.

    The config given is the one that the model keeps: it then has the ranks and shapes in `soka_modules`.

    Raises (on creation and when an adapter is added):
        FitError: a target is not a linear layer, a factor shape does not fit, or `soka_modules` names a module that
            is not there. All of them are named, and nothing has been replaced yet.
    """

    prefix = PREFIX
    tuner_layer_cls = SokaLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    # --- adding an adapter ---------------------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter; PEFT's method. With `state_dict`, its tensors say which modules, ranks and shapes."""
        config: SokaConfig = self.peft_config[adapter_name]
        others = (other for name, other in self.peft_config.items() if name != adapter_name)
        config.start_building(in_use=any(other is config for other in others))
        before, config.fan_in_fan_out = config.soka_modules, False
        self._only_recorded = state_dict is not None
        if state_dict is not None:
            config.soka_modules = {
                name: config.told(spec | config.form_of(name).spec()) for name, spec in modules_of(state_dict).items()
            }
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except Exception:
            config.soka_modules = before
            raise
        layers = [m for m in model.modules() if isinstance(m, SokaLayer) and adapter_name in m.soka_left]
        config.record({layer.module_name: layer.spec(adapter_name) for layer in layers})

    @staticmethod
    def _check_target_module_exists(peft_config: SokaConfig, key: str) -> Any:
        result = BaseTuner._check_target_module_exists(peft_config, key)
        if peft_config.is_loading and not isinstance(result, _ExcludedModule):
            return key in peft_config.soka_modules
        return result

    def _prepare_model(self, peft_config: SokaConfig, model: nn.Module) -> None:
        """Check every target before the first one is replaced."""
        _maybe_include_all_linear_layers(peft_config, model)

        def matches(key: str) -> Any:
            if self._only_recorded:
                return key in peft_config.soka_modules
            return BaseTuner._check_target_module_exists(peft_config, key)

        plan_modules(peft_config, model, matches)

    def _create_and_replace(
        self,
        peft_config: SokaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> SokaLinear:
        """Wrap one module, or give its wrapper one more adapter. The parameters are those that PEFT calls it with."""
        rank, shape = rank_and_shape(peft_config, current_key, target)
        if isinstance(target, SokaLinear):
            target.update_layer(adapter_name, rank=rank, shape=shape, config=peft_config)
            layer = target
        else:
            layer = SokaLinear(
                target, adapter_name, module_name=current_key, rank=rank, shape=shape, config=peft_config
            )
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)  # a further adapter is not trained unless it is made active
            self._replace_module(parent, target_name, layer, target)
        if layer.is_transposed:
            peft_config.fan_in_fan_out = True
        return layer

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT's option: True leaves 32 bits at least, False gives the factors the dtype of their layer."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for layer in self.modules():
                if isinstance(layer, SokaLayer):
                    layer.cast(adapter_name)

    # --- using adapters ------------------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's hook around each forward: `adapter_names` gives each row of the batch its own adapter."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        with adapter_per_row(self, adapter_names, num_beams=kwargs.get("num_beams")):
            yield

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Add the adapter sum of weights[i] * adapters[i]; exact, see `soka_serve.peft.weighted`."""
        add_weighted_adapter(self, adapters, weights, adapter_name)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """PEFT's method. With `safe_merge`, all layers are checked before the first one is changed.

        Raises:
            MergeError: a merged weight is not finite; nothing was merged.
        """
        if safe_merge:
            self._check_merge(adapter_names)
        super().merge_adapter(adapter_names)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge and safe_merge:
            self._check_merge(adapter_names)
        unloaded: nn.Module = super()._unload_and_optionally_merge(merge, progressbar, False, adapter_names)
        return unloaded

    def _check_merge(self, adapter_names: list[str] | None) -> None:
        broken = []
        for layer in self.model.modules():
            if isinstance(layer, SokaLayer):
                with onload_layer(layer):
                    if not layer.is_merge_finite(adapter_names):
                        broken.append(layer.module_name)
        if broken:
            raise not_finite(broken, adapter_names or self.active_adapters)

    # --- files ---------------------------------------------------------------------------------------------------

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """PEFT's hook: the key of a tensor in the adapter's file."""
        return file_key(key, adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SokaConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """PEFT's hook before saving: the adapter's tensors; the config gets the ranks that they have now."""
        tensors: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        found = modules_of({file_key(key, adapter_name): value for key, value in tensors.items()})
        layers = {
            clean(path).removeprefix(KEY_PREFIX): layer
            for path, layer in model.named_modules()
            if isinstance(layer, SokaLayer)
        }
        if found and set(found) <= set(layers):
            config.record(
                {
                    (layer := layers[path]).module_name: spec | layer.form(adapter_name).spec()
                    for path, spec in found.items()
                }
            )
        return tensors

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: SokaConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's hook between reading an adapter file and filling the model: checks it whole, all problems at once."""
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        fit_tensors(model, config, adapter_name, remapped)
        return remapped
