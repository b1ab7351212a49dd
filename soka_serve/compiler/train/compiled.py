"""Training steps through torch.compile, decoder layer by decoder layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from soka_serve.base.decoder import NotWalkableError, decoder_layers
from soka_serve.errors import BuildError, PlanError
from soka_serve.peft import soka_layers


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


def _unwrapped(model: Any) -> nn.Module:
    inner: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner
