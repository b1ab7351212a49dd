"""Loads many factors at a time: how adapters of one layout are read and arranged for the slots.

Adapters that were trained alike have the same config and the same header: all that is checked before the values are
read. What follows from them, where each value goes in the slots, is worked out for the first and remembered.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from soka_serve.adapter.format import SAVE_AGAIN, refusal
from soka_serve.adapter.stacks import Stack, Stacks
from soka_serve.errors import first_ten
from soka_serve.io.file_names import WEIGHTS_FILE
from soka_serve.io.safetensors import all_finite, find_not_finite
from soka_vllm import compat
from soka_vllm.layers import ARRANGED, KroneckerMixin
from soka_vllm.ops.torch_ops import StackKind, arranged
from soka_vllm.slots import Arranged
from soka_vllm.store import bytes_of

_MOST_PLANS = 16


class Place(NamedTuple):
    """Where a module goes: its name in the served model, and the slice of a layer's output that is all of it."""

    name: str
    slice: int


class PlannedStack(NamedTuple):
    """Modules of one rank and shape, how slots hold the factors of each, and where each goes."""

    stack: Stack
    kind: StackKind
    places: tuple[Place, ...]

    @property
    def values(self) -> int:
        """Of all factors in slots."""
        return len(self.places) * self.kind.size


class Loaded(NamedTuple):
    """An adapter's factors as slots hold them.

    Args:
        factors: by module of the served model Left (r, m, n), which knows its place in a slot, and Right (r, p, q).
        fingerprint: of all values of the file and what they are of.
        nbytes: of all factors.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    fingerprint: str
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """How adapters of one layout are loaded.

    Args:
        stacks: of the file.
        planned: the same, with their places.
    """

    stacks: Stacks
    planned: tuple[PlannedStack, ...]

    @property
    def ranks(self) -> tuple[int, int]:
        """The least and the largest."""
        ranks = [stack.rank for stack in self.stacks.stacks]
        return min(ranks), max(ranks)

    def load(self, directory: Path, dtype: torch.dtype) -> Loaded:
        """Read an adapter of this layout; its factors are in `dtype`, in one piece of memory.

        Raises:
            CheckpointError: values that are not finite in the file, or a file that ends early.
            ValueError: values that are not finite in `dtype`.
        """
        values = self.stacks.read(directory)
        sizes = [planned.values for planned in self.planned]
        own = torch.empty(sum(sizes), dtype=dtype)
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        for (stack, kind, places), flat in zip(self.planned, torch.split(own, sizes), strict=True):
            block = flat.view(len(places), kind.size)
            lefts, rights = arranged(block, kind)
            left, right, sigma = stack.factors(values)
            lefts.copy_(left.to(torch.float32, copy=True).mul_(sigma.to(torch.float32)[:, :, None, None]))
            rights.copy_(right)
            # To unbind makes the views of all modules by one call.
            for place, own_left, own_right, flat_part in zip(
                places, lefts.unbind(), rights.unbind(), block.unbind(), strict=True
            ):
                setattr(own_left, ARRANGED, (place.slice, Arranged(kind, flat_part)))
                factors[place.name] = own_left, own_right
        if not all_finite(own):
            self._name_not_finite(directory, values, factors, dtype)
        digest = xxhash.xxh3_128(self._described)
        digest.update(bytes_of(values))
        return Loaded(factors, digest.hexdigest(), own.nbytes)

    @cached_property
    def _described(self) -> bytes:
        """What the values of the file are of."""
        stacks = [(s.names, s.rank, s.shape, s.starts.tolist()) for s in self.stacks.stacks]
        return f"{self.stacks.dtype} {stacks}".encode()

    def _name_not_finite(
        self, directory: Path, values: Tensor, factors: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype
    ) -> None:
        spoilt = find_not_finite(dict(self.stacks.tensors(values)))
        if spoilt:
            problems = [f"{WEIGHTS_FILE}: {name} has values that are not finite" for name in spoilt]
            raise refusal(directory, problems, SAVE_AGAIN)
        parts = {
            f"{name}: {part}": tensor
            for name, pair in factors.items()
            for part, tensor in zip(("Left", "Right"), pair, strict=True)
        }
        refuse_not_finite(parts, dtype)


def refuse_not_finite(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Raises ValueError where factors in the slots' dtype hold NaN or infinity, and names them."""
    spoilt = find_not_finite(tensors)
    if spoilt:
        raise ValueError("\n".join(first_ten([f"{name} has values that are not finite in {dtype}" for name in spoilt])))


def make_plan(stacks: Stacks, names: Mapping[str, str], places: Mapping[str, tuple[Any, int]]) -> Plan | None:
    """How adapters of a layout, which fits the model, are loaded.

    Args:
        stacks: of the adapter.
        names: from the served model's module names to the adapter's.
        places: by the served model's module name its layer, and its index in that.

    Returns:
        The plan; None where a layer of this worker holds less than all of a module, or on a GPU.
    """
    served = {own: name for name, own in names.items()}
    planned = []
    for stack in stacks.stacks:
        kinds, found = set(), []
        for own in stack.names:
            name = served.get(own, "")  # none where another of the adapter's modules is served under its name
            layer, index = places.get(name, (None, 0))
            slice_ = layer.whole_slice(index) if isinstance(layer, KroneckerMixin) else None
            if layer is None or slice_ is None:
                return None
            kinds.add(layer.kind(stack.rank, stack.shape))
            found.append(Place(name, slice_))
        (kind,) = kinds
        planned.append(PlannedStack(stack, kind, tuple(found)))
    return Plan(stacks, tuple(planned))


@dataclass
class Plans:
    """A worker's plans by layout, the last used last.

    Args:
        alone: there is no other worker, which would take another way and come to another fingerprint.
    """

    alone: bool
    by_layout: OrderedDict[bytes, Plan] = field(default_factory=OrderedDict)

    def find(self, layout: bytes | None) -> Plan | None:
        """The plan for a layout that is known."""
        plan = None if layout is None else self.by_layout.get(layout)
        if plan is not None and layout is not None:
            self.by_layout.move_to_end(layout)
        return plan

    def keep(self, layout: bytes | None, plan: Plan | None) -> None:
        """Remember a plan; the longest unused one makes room."""
        if plan is not None and layout is not None:
            self.by_layout[layout] = plan
            while len(self.by_layout) > _MOST_PLANS:
                self.by_layout.popitem(last=False)


def plans_of(manager: Any) -> Plans:
    """Those of vLLM's LoRAModelManager, made at the first call."""
    if "_soka_plans" not in manager.__dict__:
        manager._soka_plans = Plans(compat.workers() == 1)
    plans = manager._soka_plans
    assert isinstance(plans, Plans)
    return plans
