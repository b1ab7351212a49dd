"""Containers of a layer's tensors: one per part of the factors, with one tensor per adapter.

A parameter is named `...q_proj.soka_left.default.weight`. The adapter's name stands between dots, as in PEFT's LoRA,
because programs copy one adapter onto another by that: TRL makes its reference model so. The file holds
`...q_proj.soka_left`, without the adapter's name (`file_key`).
"""

from __future__ import annotations

import re
from typing import cast

import torch
from torch import Tensor, nn

from soka_serve.trained import PARTS, TENSORS

__all__ = ["PARTS", "PREFIX", "STORES", "Part", "Parts", "file_key", "part_of"]

PREFIX = "soka_"
STORES = rf"{PREFIX}(?:(?:{'|'.join(PARTS)})(?:_initial)?|{'|'.join(TENSORS)})"
"""A regular expression for the names of the containers."""


def part_of(store: str) -> str:
    """The part whose tensors a container holds, initial ones or not.

    >>> part_of("soka_left_initial")
    'left'
    """
    return store.removeprefix(PREFIX).removesuffix("_initial")


def file_key(key: str, adapter: str) -> str:
    """The name of a tensor in the adapter's file, from its name in the model; other names come back as they are.

    >>> file_key("model.q_proj.soka_left_initial.default.weight", "default")
    'model.q_proj.soka_left_initial'
    """
    return re.sub(rf"(\.{STORES})\.{re.escape(adapter)}\.weight$", r"\1", key)


class Part(nn.Module):
    """One tensor of one adapter."""

    def __init__(self, value: Tensor, *, trained: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(value, requires_grad=trained)


class Parts(nn.ModuleDict):
    """One part of the factors, by adapter. Indexing gives the parameter itself; `items` and `values` give modules.

    Args:
        trained: whether new tensors need gradients. The initial factors are parameters too, so that copying an adapter
            by its parameters' names copies all of it, but frozen ones.
    """

    def __init__(self, *, trained: bool) -> None:
        super().__init__()
        self._trained = trained

    def __getitem__(self, adapter: str) -> nn.Parameter:  # type: ignore[override]
        return cast("nn.Parameter", self._modules[adapter].weight)

    def __setitem__(self, adapter: str, value: Tensor) -> None:  # type: ignore[override]
        """Keep `value`, under the same name and with the same `requires_grad` as the tensor that it replaces."""
        if adapter not in self._modules:
            self.add_module(adapter, Part(value.detach(), trained=self._trained))
        elif value is not self[adapter]:
            part = cast("Part", self._modules[adapter])
            part.weight = nn.Parameter(value.detach(), requires_grad=part.weight.requires_grad)

    def cast(self, adapter: str, dtype: torch.dtype) -> None:
        """Change the dtype of an adapter's tensor, if it has one; the parameter keeps its identity."""
        if adapter in self._modules:
            self[adapter].data = self[adapter].data.to(dtype)
