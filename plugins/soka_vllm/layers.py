"""vLLM's LoRA layers, extended to hold Kronecker factors in some slots and LoRA's in others."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from soka_vllm import compat
from soka_vllm.sharding import LayerShards, cut
from soka_vllm.slots import SlotStore


class KroneckerMixin:
    """Goes before one of `compat.LORA_LAYERS` among the bases of a class (`kronecker_class`).

    A slot holds a LoRA adapter, a Kronecker adapter or nothing. LoRA's buffers are allocated with the first LoRA
    adapter, and while no slot holds one its code is skipped. One slot more than asked for is allocated and stays
    empty: vLLM's CPU code of these versions reads the last one for tokens of the base model.
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
        self._kronecker = SlotStore(
            max_loras + 1, self.shards.widths, self.shards.in_features, lora_config.lora_dtype, self.device
        )
        self._lora_slots: set[int] = set()
        self._lora_arguments = (max_loras + 1, lora_config, model_config)
        self._lora_allocated = False
        if type(self.base_layer) not in compat.PLAIN_LINEARS:
            self._allocate_lora()

    def reset_lora(self, index: int) -> None:
        """Empty a slot."""
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
            if not self._lora_allocated:
                self._allocate_lora()
            cast(Any, super()).set_lora(index, lora_a, lora_b)  # begins with reset_lora
            self._lora_slots.add(index)
            return
        self.reset_lora(index)
        for i, part in enumerate(self.shards.slices):
            left, right = lefts[part.source], rights[part.source]
            if left is not None:
                left, right, out_skip, in_skip = cut(left, right, part.rows, part.columns)
                self._kronecker.put(index, i, left, right, out_skip=out_skip, in_skip=in_skip)

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The base layer's output with each token's delta, (tokens, in) -> (tokens, out), both as this rank holds them.

        vLLM reduces over the ranks of a row-parallel layer after this, so that each adds its part of the delta.
        """
        if self._lora_slots or type(self.base_layer) not in compat.PLAIN_LINEARS:
            out = cast(Tensor, cast(Any, super()).apply(x, bias))
        else:
            out = cast(Tensor, self.base_layer.quant_method.apply(self.base_layer, x, bias))
        if not self._kronecker.empty:
            indices = self.punica_wrapper._token_lora_indices
            self._kronecker.add_to(out.view(-1, out.shape[-1]), x.reshape(-1, x.shape[-1]), indices)
        return out

    def _allocate_lora(self) -> None:
        with torch.inference_mode(False):  # as for SlotStore's buffer
            cast(Any, super()).create_lora_weights(*self._lora_arguments)
        self._lora_allocated = True


@cache
def kronecker_class(cls: type[Any]) -> type[Any]:
    """The subclass of one of vLLM's LoRA layers that holds Kronecker factors too."""
    return type(f"Kronecker{cls.__name__}", (KroneckerMixin, cls), {})
