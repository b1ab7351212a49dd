"""vLLM's LoRA layers, extended to hold Kronecker factors in some slots and LoRA's in others."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from soka_serve.kron.shapes import FactorShape
from soka_serve.kron.sharding import Cut, LayerShards, Shard, cut
from soka_vllm import compat
from soka_vllm.ops import cpu_kernel
from soka_vllm.ops.torch_ops import StackKind
from soka_vllm.settings import serves_lora
from soka_vllm.slots import Arranged, SlotStore
from soka_vllm.worker import ADAPTERS_IN_STEP

_logger = logging.getLogger("vllm.soka")

# Of a Left: its slice of the layer, and it and its Right as a slot holds them.
ARRANGED = "soka_arranged"


class KroneckerMixin:
    """Mixin for a subclass of one of `compat.LORA_LAYERS` (see `kronecker_class`); comes first among its bases.

    A slot holds a LoRA adapter, a Kronecker adapter or nothing.

    On a CPU, LoRA's buffers are allocated with the first LoRA adapter, and while no slot holds one its code is skipped.
    One slot more than asked for is allocated and stays empty: vLLM's CPU code of these versions reads the last one for
    tokens of the base model. On a GPU, memory is shared out and calls are recorded before the first adapter comes, so
    LoRA's part is there from the start and always runs, or with SOKA_LORA=0 never.
    """

    base_layer: Any
    lora_config: Any
    punica_wrapper: Any
    device: torch.device
    shards: LayerShards

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        """Make the slots; called by vLLM once per layer."""
        self.lora_config = lora_config
        self.shards = compat.shards_of(self)
        on_cpu = torch.device(self.device).type == "cpu"
        self._on_cpu = on_cpu
        if on_cpu:  # calls ask for it many times, and vLLM's way to a submodule costs as much as a small product
            self.__dict__["base_layer"] = self.base_layer
            cpu_kernel.load()  # so that no step waits for a compiler
        slots = max_loras + 1 if on_cpu else max_loras
        self._kronecker = SlotStore(
            slots, self.shards.widths, self.shards.in_features, lora_config.lora_dtype, self.device
        )
        self._lora_slots: set[int] = set()
        self._beside = False  # whether LoRA's matrices are being put beside Kronecker factors
        self._lora_arguments = (slots, lora_config, model_config)
        self._plain = type(self.base_layer) in compat.PLAIN_LINEARS
        self._lora_served = serves_lora()
        self._lora_allocated = False
        self._lora_always = not on_cpu or not self._plain
        if not self._plain or (self._lora_always and self._lora_served):
            self._allocate_lora()
        elif not self._lora_served:
            # vLLM takes the shapes of its dummy adapters for the warm-up from LoRA's buffers; these have no memory.
            shapes = [(slots, 1, size, lora_config.max_lora_rank) for size in self.shards.widths]
            self.lora_a_stacked = tuple(torch.empty(1, 1, 1, self.shards.in_features, device="meta") for _ in shapes)
            self.lora_b_stacked = tuple(torch.empty(shape, device="meta") for shape in shapes)

    @property
    def slot_values(self) -> int | None:
        """How many values of factors one adapter may have on this rank, all layers together; None: any number."""
        return self._kronecker.slot_values

    def parts(self, index: int, left: Tensor, right: Tensor) -> list[tuple[int, Cut]]:
        """What this rank takes of a module's factors: slices of the output, and the factors of each.

        Args:
            index: which of the layer's modules.
            left, right: (r, m, n) and (r, p, q), of the whole module.
        """
        slices = enumerate(self.shards.slices)
        return [(i, cut(left, right, part.rows, part.columns)) for i, part in slices if part.source == index]

    def arranged(self, index: int, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """A module's factors in memory of their own, as this layer's slots hold them.

        Args:
            index, left, right: as for `parts`.

        Returns:
            Left and Right as given, which `set_lora` puts into a slot by one copy, and the (values,) that they are
            views of. None where this rank holds another part than all of them, and on a GPU.
        """
        (slice_, part), *more = self.parts(index, left, right)
        if not self._on_cpu or more or part.left.numel() + part.right.numel() != left.numel() + right.numel():
            return None
        found = self._kronecker.arrange(left, right, out_skip=part.out_skip, in_skip=part.in_skip)
        left, right = found.factors
        setattr(left, ARRANGED, (slice_, found))
        return left, right, found.values

    def whole_slice(self, index: int) -> int | None:
        """The slice that is all of a module, where `arranged` has factors of the module; else None."""
        found = [(i, part) for i, part in enumerate(self.shards.slices) if part.source == index]
        if not self._on_cpu or len(found) != 1:
            return None
        rows, columns = self.shards.shapes[index]
        return found[0][0] if found[0][1] == Shard(index, range(rows), range(columns)) else None

    def kind(self, rank: int, shape: FactorShape) -> StackKind:
        """How a slot of this layer holds whole factors of a rank and shape."""
        return self._kronecker.kind(rank, shape)

    def reset_lora(self, index: int) -> None:
        """Empty a slot."""
        if not self._beside:
            self._kronecker.clear(index)
        if index in self._lora_slots:
            self._lora_slots.remove(index)
            cast(Any, super()).reset_lora(index)

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Fill a slot: with Kronecker factors where they have three dimensions, else with LoRA's matrices.

        Args:
            index: the slot.
            lora_a, lora_b: of the whole layer, whatever the number of ranks: one tensor, or one per packed module with
                None for those that the adapter leaves alone. This rank's part is cut out here.
        """
        lefts, rights = ([lora_a], [lora_b]) if isinstance(lora_a, Tensor) else (lora_a, lora_b)
        if not any(left is not None and left.ndim == 3 for left in lefts):
            if not self._lora_served:
                self.reset_lora(index)  # a dummy of vLLM's warm-up; real ones are refused when they are read
                return
            if not self._lora_allocated:
                self._allocate_lora()
            cast(Any, super()).set_lora(index, lora_a, lora_b)  # begins with reset_lora
            self._lora_slots.add(index)
            return
        ready = [one for left in lefts if (one := getattr(left, ARRANGED, None)) is not None]
        all_ready = len(ready) == sum(left is not None for left in lefts)
        if all_ready and index not in self._lora_slots and self._kronecker.overwrite(index, ready):
            return
        self.reset_lora(index)
        if not all_ready:
            pairs = enumerate(zip(lefts, rights, strict=True))
            ready = [
                one
                for source, (left, right) in pairs
                if left is not None
                for one in self._arranged(source, left, right)
            ]
        self._kronecker.fill(index, ready)

    def _arranged(self, source: int, left: Tensor, right: Tensor) -> list[tuple[int, Arranged]]:
        """What this rank takes of a module's factors as slots hold them, and of which slices it is."""
        if (one := getattr(left, ARRANGED, None)) is not None:
            return [one]
        arrange = self._kronecker.arrange
        return [
            (i, arrange(part.left, part.right, out_skip=part.out_skip, in_skip=part.in_skip))
            for i, part in self.parts(source, left, right)
        ]

    def set_lora_beside(self, index: int, lora_a: list[Tensor | None], lora_b: list[Tensor | None]) -> None:
        """Add LoRA's matrices to a slot that holds Kronecker factors: the layer adds both deltas.

        Args:
            index: the slot.
            lora_a, lora_b: of the whole layer, one per packed module, None for those without any.
        """
        if not self._lora_allocated:
            self._allocate_lora()
        packed = len(lora_a) > 1
        self._beside = True
        try:
            cast(Any, super()).set_lora(index, lora_a if packed else lora_a[0], lora_b if packed else lora_b[0])
        finally:
            self._beside = False
        self._lora_slots.add(index)

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The base layer's output with each token's delta, (tokens, in) -> (tokens, out), both as this rank holds them.

        vLLM reduces over the ranks of a row-parallel layer after this, so that each adds its part of the delta.
        """
        # On a GPU this is traced or recorded once for good: nothing here may depend on what the slots hold.
        wanted = not self._on_cpu or getattr(self.punica_wrapper, ADAPTERS_IN_STEP, True)
        if self._lora_allocated and (self._lora_always or (wanted and self._lora_slots)):
            out = cast(Tensor, cast(Any, super()).apply(x, bias))
        else:
            out = cast(Tensor, self.base_layer.quant_method.apply(self.base_layer, x, bias))
        if wanted and not self._kronecker.empty:
            indices = self.punica_wrapper._token_lora_indices
            self._kronecker.add_to(out.view(-1, out.shape[-1]), x.reshape(-1, x.shape[-1]), indices)
        return out

    def _allocate_lora(self) -> None:
        with torch.inference_mode(False):  # as for SlotStore's buffer
            cast(Any, super()).create_lora_weights(*self._lora_arguments)
        self._lora_allocated = True


def kronecker_classes(classes: tuple[Any, ...]) -> tuple[Any, ...]:
    """vllm.lora.utils._all_lora_classes, with those that hold Kronecker factors too in the place of LORA_LAYERS."""
    if not compat.has_operator():
        return classes
    if not compat.on_cpu():
        _logger.warning("Kronecker adapters have been tested in whole servers on CPUs only, not on a GPU")
    return tuple(kronecker_class(cls) if cls in compat.LORA_LAYERS else cls for cls in classes)


@cache
def kronecker_class(cls: type[Any]) -> type[Any]:
    """The subclass of one of vLLM's LoRA layers that holds Kronecker factors too."""
    return type(f"Kronecker{cls.__name__}", (KroneckerMixin, cls), {})
