"""Where a causal model of transformers' keeps its decoder layers."""

from __future__ import annotations

from typing import Any, cast

from torch import nn


class NotWalkableError(Exception):
    """The layers of this model cannot be told, or run one by one; the message says why."""


def decoder_layers(model: nn.Module) -> tuple[nn.Module, str, list[nn.Module]]:
    """The decoder, the name in `model` of its list of layers, and the layers. Raises NotWalkableError: it has none."""
    decoder = cast(Any, model).get_decoder() if hasattr(model, "get_decoder") else None
    config = getattr(decoder, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    layers = getattr(decoder, "layers", None)
    if not isinstance(decoder, nn.Module) or not isinstance(layers, nn.ModuleList) or len(layers) != count:
        raise NotWalkableError("it has no decoder whose `layers` are as many as its configuration says")
    name = next(name for name, module in model.named_modules() if module is layers)
    return decoder, name, list(layers)
