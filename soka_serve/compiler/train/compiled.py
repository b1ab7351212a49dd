"""Training steps through torch.compile, decoder layer by decoder layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from soka_serve.base.decoder import NotWalkableError, decoder_layers
from soka_serve.errors import BuildError, PlanError
from soka_serve.peft import soka_layers

_MOST_GRAPHS = 64  # layers whose numbers of terms differ have graphs of their own; torch would stop at 8


@contextmanager
def compiled_layers(model: nn.Module) -> Iterator[None]:
    """Meanwhile each decoder layer of a model runs compiled; the embedding and the head do not.

    Layers are alike, so that one compilation serves all, which takes seconds where the whole model takes minutes. Rows
    may have any length. torch compiles at the first call, and again for what differs by more than the length: the first
    layer, whose input needs no gradient, and evaluations.

    Raises:
        PlanError: the model has no list of decoder layers.
        BuildError: torch cannot compile here.
    """
    try:
        layers = decoder_layers(_unwrapped(model))[2]
    except NotWalkableError as error:
        raise PlanError(f"train.compile does not go with this model: {error}", hint="leave it out") from error
    for adapted in soka_layers(model).values():  # else the first calls ask, which cuts the layer in two
        for adapter in adapted.adapter_names():
            adapted.check_loaded(adapter)
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        with torch._dynamo.config.patch(recompile_limit=_MOST_GRAPHS):
            yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = getattr(error, "inner_exception", error)
        raise BuildError(
            f"train.compile: torch cannot compile here: {str(reason).strip().splitlines()[0]}",
            hint="a CPU needs a C++ compiler (g++) and Python's headers, a GPU needs Triton; or leave compile out",
        ) from error
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


@contextmanager
def plain_layers(model: nn.Module) -> Iterator[None]:
    """Meanwhile modules that are compiled run as they are: answers, with a cache and a token at a time, do not pay."""
    found = {module: call for module in model.modules() if (call := module._compiled_call_impl) is not None}
    for module in found:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in found.items():
            module._compiled_call_impl = call


def _unwrapped(model: Any) -> nn.Module:
    inner: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner
