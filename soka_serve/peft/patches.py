"""Extensions of PEFT where it has fixed lists and functions instead of a registration.

- transformers' `model.load_adapter` renames tensors by `build_peft_weight_mapping`, which adds the adapter's name where
  LoRA has it; our parameters end in `.weight` behind it (`soka_serve.peft.parts`).
- `PeftMixedModel` knows its methods by name.

Both belong to the releases of PEFT that `registration` accepts.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from peft.utils import PeftType

from soka_serve.peft.config import SokaConfig
from soka_serve.peft.layer import SokaLayer
from soka_serve.peft.loading import plan_modules
from soka_serve.peft.model import SokaModel
from soka_serve.peft.parts import PREFIX, STORES


def apply_patches(peft_type: PeftType) -> None:
    """Extend PEFT. Calling it again does nothing."""
    _extend_weight_mapping(peft_type)
    _extend_mixed_model(peft_type)


def _extend_weight_mapping(peft_type: PeftType) -> None:
    """Let transformers' `model.load_adapter` find the parameters of SoKA adapters."""
    try:
        from peft.utils import transformers_weight_conversion as conversion
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # transformers 4 renames nothing
        return
    build = conversion.build_peft_weight_mapping
    if hasattr(build, "_knows_soka"):
        return

    @functools.wraps(build)
    def build_peft_weight_mapping(weight_conversions: Any, adapter_name: str, peft_config: Any = None) -> Any:
        mapping = build(weight_conversions, adapter_name, peft_config=peft_config)
        if mapping and getattr(peft_config, "peft_type", None) == peft_type:
            source = rf"({STORES}\.{re.escape(adapter_name)})$"
            mapping.append(WeightRenaming(source_patterns=source, target_patterns=r"\1.weight"))
        return mapping

    build_peft_weight_mapping._knows_soka = True  # type: ignore[attr-defined]
    conversion.build_peft_weight_mapping = build_peft_weight_mapping


def _extend_mixed_model(peft_type: PeftType) -> None:
    """Let `PeftMixedModel` hold SoKA adapters next to those of other methods."""
    from peft.tuners import mixed
    from peft.tuners.mixed import model as module

    if peft_type in module.COMPATIBLE_TUNER_TYPES:
        return
    module.COMPATIBLE_TUNER_TYPES = mixed.COMPATIBLE_TUNER_TYPES = (*module.COMPATIBLE_TUNER_TYPES, peft_type)
    module.PREFIXES.append(PREFIX)
    module.Layers = (*module.Layers, SokaLayer)
    module.Configs = module.Configs | SokaConfig
    replace, prepare = module.MixedModel._create_and_replace, module.MixedModel._prepare_model

    def create_and_replace(self: Any, config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if not isinstance(config, SokaConfig):
            replace(self, config, adapter_name, *args, **kwargs)
            return
        layer = SokaModel._create_and_replace(self, config, adapter_name, *args, **kwargs)
        config.record({**config.soka_modules, layer.module_name: layer.spec(adapter_name)})

    def prepare_model(self: Any, config: Any, model: Any) -> None:
        prepare(self, config, model)
        if isinstance(config, SokaConfig):
            config.start_building(in_use=False)
            plan_modules(config, model, lambda key: self._check_target_module_exists(config, key), nested=True)

    module.MixedModel._create_and_replace = create_and_replace
    module.MixedModel._prepare_model = prepare_model
