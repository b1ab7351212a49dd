"""PEFT's `adapter_names=[...]`: one adapter per row of a batch, at inference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from soka_serve.peft.layer import BASE, SokaLayer


@contextmanager
def adapter_per_row(model: nn.Module, adapter_names: Sequence[str], *, num_beams: object = None) -> Iterator[None]:
    """While this is active, row i of a batch goes through adapter `adapter_names[i]`.

    Args:
        model: the tuner (`SokaModel`).
        adapter_names: one per row; `__base__` for none.
        num_beams: beams of `generate`, which repeats each row so many times.

    Raises:
        ValueError: the model is in training mode, or a name is not an adapter's. A wrong number of names, and merged
            adapters, are errors in the layers.
        TypeError: the names are not a list.
    """
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence):
        raise TypeError(f"Got adapter names of type {type(adapter_names)}, expected a list of str.")
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    known = {name for layer in model.modules() if isinstance(layer, SokaLayer) for name in layer.soka_left}
    unknown = sorted(set(adapter_names) - known - {BASE})
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    rows = list(adapter_names)
    beams = num_beams if isinstance(num_beams, int) and num_beams > 1 else 1
    repeated = [name for name in rows for _ in range(beams)]
    encoder = set(_encoder_modules(model))  # an encoder still sees each row once

    def hook(names: list[str]) -> Any:
        return lambda module, args, kwargs: (args, {**kwargs, "adapter_names": names})

    handles = [
        module.register_forward_pre_hook(hook(rows if module in encoder else repeated), with_kwargs=True)
        for module in model.modules()
        if isinstance(module, SokaLayer | AuxiliaryTrainingWrapper)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _encoder_modules(model: Any) -> Iterator[nn.Module]:
    """The modules of an encoder-decoder's encoder; none of other models."""
    base = model.model
    encoder = base.get_encoder() if hasattr(base, "get_encoder") else None
    if encoder is not None and encoder is not base:
        yield from encoder.modules()
