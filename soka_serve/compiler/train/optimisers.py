"""The Trainer's optimisers over our parameter groups, and what their resume points hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from soka_serve.errors import BuildError
from soka_serve.manifest.optimisers import OPTIMISERS

Group = dict[str, Any]


def make_optimiser(name: str, trainer: Trainer, groups: Sequence[Group], model: Any) -> torch.optim.Optimizer:
    """An optimiser over groups that have their own rates and weight decay.

    Raises:
        BuildError: the installed package cannot make it.
    """
    try:
        made, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    except (ImportError, ValueError) as error:
        raise BuildError(f'train.optimiser = "{name}": {error}', hint="take another optimiser") from error
    if OPTIMISERS[name].projects:  # the Trainer's own groups: what it does not project, and what it does, and how
        _, projected = options.pop("params")
        head = model.get_output_embeddings()  # as PEFT has it, "all-linear" is all but the output layer
        groups = list(_split(groups, projected, None if head is None else head.weight))
    optimiser: torch.optim.Optimizer = made(list(groups), **options)
    return optimiser


def _split(groups: Sequence[Group], projected: Group, spared: Tensor | None) -> Iterator[Group]:
    """The groups, each parted into the rest and what is projected, with the settings of that."""
    chosen = set(projected["params"]) - {spared}
    settings = {key: value for key, value in projected.items() if key != "params"}
    for group in groups:
        for inside in (False, True):
            if parameters := [p for p in group["params"] if (p in chosen) == inside]:
                yield {**group, **(settings if inside else {}), "params": parameters}


def stored_classes(name: str) -> AbstractContextManager[None]:
    """Within it, resume points are read that hold the classes of an optimiser's state beside tensors, and no others."""
    classes = (place.split(":") for place in OPTIMISERS[name].state)
    return torch.serialization.safe_globals([getattr(import_module(module), kind) for module, kind in classes])
