"""The base layer under an adapter: reading its weight as (out, in), merging deltas into it, and taking them out again.

A merge keeps the original weight aside, so `unmerge` gives it back bit for bit.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from soka_serve.kron import Factors, add_delta_
from soka_serve.peft.errors import MergeError

log = logging.getLogger(__name__)

KBIT_BACKENDS = ("bnb 8bit", "bnb 4bit")


def find_backend(layer: nn.Module) -> QuantizationBackend | None:
    """How a layer's weight is quantised; None where it is not. ValueError (PEFT's) for torchao without its config."""
    weight: Any = getattr(layer, "weight", None)
    if type(layer) is nn.Linear and type(weight.data) is Tensor:
        return None  # PEFT's look-up tries a dozen libraries
    return resolve_quantization_backend(layer)


def weight_size(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer; transformers' Conv1D, which stores (in, out), included."""
    if isinstance(layer, Conv1D):
        return int(layer.weight.shape[1]), int(layer.weight.shape[0])
    return cast("int", layer.out_features), cast("int", layer.in_features)


def not_finite(modules: list[str], adapters: list[str]) -> MergeError:
    """The error for merged weights that are not finite. Its second half is PEFT's wording, which programs look for."""
    names = ", ".join(adapters)
    more = f" (and {len(modules) - 1} more modules)" if len(modules) > 1 else ""
    return MergeError(
        f"{modules[0]}{more}: merging {names} gives values that are not finite; nothing was merged. "
        f"NaNs detected in the merged weights. The adapter {names} seems to be broken",
        hint="the adapter is broken, or was made for another base",
    )


class MergingLayer(BaseTunerLayer):  # type: ignore[misc]
    """A layer that can put `base + deltas` into its base. Subclasses say what the deltas are."""

    base_layer: nn.Module
    module_name: str

    def __init__(self, base_layer: nn.Module, module_name: str) -> None:
        self.base_layer = base_layer
        self.module_name = module_name
        base = self.get_base_layer()
        self.quantization_backend = find_backend(base)
        self.out_features, self.in_features = weight_size(base)
        self.is_transposed = isinstance(base, Conv1D)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._original: dict[str, Any] | None = None
        self._merged_sum: int | None = None

    def adapter_names(self) -> list[str]:
        """Names of the adapters that this layer has."""
        raise NotImplementedError

    def delta(self, adapter: str, dtype: torch.dtype | None = None) -> Factors:
        """The terms that are added to the base, factors in `dtype` before anything is subtracted."""
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put base + deltas into the base layer, rounded once, however many adapters are merged.

        The original weight is kept aside (in host memory; without a copy where it lies there already), so `unmerge`
        gives it back bit for bit, k-bit weights included. A k-bit base is dequantised and quantised again: small
        deltas get lost in that rounding, so merging into the full-precision checkpoint (`soka-serve merge`) is better.

        Args:
            safe_merge: refuse a result that is not finite and leave the base as it was.
            adapter_names: which adapters; None means the active ones.

        Raises:
            MergeError: with safe_merge, when the merged weight is not finite. It is a ValueError, as PEFT's own.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.adapter_names()]
        if not names:
            return
        if self.quantization_backend is not None:
            kind = self.quantization_backend.backend_name
            log.warning("%s: the merged weight is rounded to %s again", self.module_name, kind)
        before = list(self.merged_adapters)
        if before:
            self.unmerge()
        original = self._snapshot()
        merged = self._merged([*before, *names])
        if safe_merge and not bool(torch.isfinite(merged).all()):
            if before:
                self._write(original, self._merged(before), before)
            raise not_finite([self.module_name], names)
        self._write(original, merged, [*before, *names])

    def is_merge_finite(self, adapter_names: list[str] | None = None) -> bool:
        """Whether `merge` would give a finite weight. Changes nothing."""
        wanted = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in wanted if name in self.adapter_names() and name not in self.merged_adapters]
        return not names or bool(torch.isfinite(self._merged(names)).all())

    def unmerge(self) -> None:
        """Take all merged adapters out again: the original weight comes back bit for bit.

        Where something else has changed the weight since (an adapter of another method, merged on the same layer), its
        change stays, and the deltas are subtracted instead, which rounds.
        """
        if self._original is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._merged_sum is None or self._merged_sum == _bit_sum(self.get_base_layer().weight):
            self._restore(self._original)
        else:
            log.warning("%s: the merged weight was changed since; its change is kept", self.module_name)
            self.set_base_weight(self._oriented(self._merged(self.merged_adapters, sign=-1)))
        self._original = None
        self.merged_adapters = []

    def _exact_dtype(self) -> torch.dtype:
        """Float64, where the device has it: merged weights are rounded once, and terms may cancel."""
        return torch.float32 if self.get_base_layer().weight.device.type == "mps" else torch.float64

    @torch.no_grad()
    def _merged(self, names: list[str], *, sign: float = 1) -> Tensor:
        """The sum of base and deltas (out, in) as a new tensor of the base's dtype."""
        base = self.float_weight()
        # One delta goes block by block into a copy; of several, the sum must not be rounded in between.
        merged = base.clone(memory_format=torch.contiguous_format)
        if len(names) > 1:
            merged = base.to(self._exact_dtype(), copy=True, memory_format=torch.contiguous_format)
        for name in names:
            add_delta_(merged, self.delta(name, self._exact_dtype()), sign)
        return merged.to(base.dtype)

    def _write(self, original: dict[str, Any], merged: Tensor, names: list[str]) -> None:
        self.set_base_weight(self._oriented(merged))
        self._original, self.merged_adapters = original, names
        plain = self.quantization_backend is None
        self._merged_sum = _bit_sum(self.get_base_layer().weight) if plain else None

    def _oriented(self, weight: Tensor) -> Tensor:
        """A weight (out, in) as the base stores it, and the other way round."""
        return weight.T.contiguous() if self.is_transposed else weight

    def _snapshot(self) -> dict[str, Any]:
        """What `_restore` needs to bring the base's weight back. k-bit weights are small and stay where they are."""
        base = self.get_base_layer()
        if self.quantization_backend is None:
            return {"weight": base.weight.data.to("cpu")}
        state = getattr(base, "state", None)  # Linear8bitLt holds the quantised weight there after the first forward
        kept = {name: getattr(state, name) for name in ("CB", "SCB") if hasattr(state, name)}
        # The attributes, as PEFT marks the old Params4bit as not quantised when it sets a new one.
        return {"weight": base.weight, "attributes": dict(vars(base.weight)), "state": kept}

    def _restore(self, snapshot: dict[str, Any]) -> None:
        base = self.get_base_layer()
        if self.quantization_backend is None:
            base.weight.data = snapshot["weight"].to(base.weight.device)
            return
        base.weight = snapshot["weight"]
        vars(base.weight).update(snapshot["attributes"])
        for name, value in snapshot["state"].items():
            setattr(base.state, name, value)

    def float_weight(self) -> Tensor:
        """The base's weight (out, in), dequantised where it is quantised; the base's own memory where it is not."""
        base: Any = self.get_base_layer()
        if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
            # On the CPU, bitsandbytes repacks a 4-bit weight in place at its first inference, and neither dequantises
            # the repacked bytes nor restores them rightly. The layer itself still knows what they mean.
            with torch.no_grad():
                result = base(torch.eye(self.in_features, dtype=torch.float32))
                return cast("Tensor", (result if base.bias is None else result - base.bias).T.contiguous())
        weight = cast("Tensor", self.get_base_weight()).detach()
        return weight.T if self.is_transposed else weight

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """The delta is additive, so PEFT's `convert_to_lora` works."""
        return not self.is_transposed


def _bit_sum(weight: Tensor) -> int:
    """The sum of a tensor's bits, read as integers: another one after nearly any change of the values."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return int(weight.detach().view(bits).sum(dtype=torch.int64))
