"""One adapted projection: y = W x + K(theta) x - K(initial) x.

K(theta) = sum_k sigma_k kron(left_k, right_k). The base weight W is never rewritten by the adapter (only by an explicit
`merge`, which keeps the original aside), so it stays shareable, quantisable and bit-identical.
"""

from __future__ import annotations

import logging
import warnings
import zlib
from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend
from torch import Tensor, nn

from soka_serve.errors import CheckpointError, SokaError
from soka_serve.kron import Factors, add_delta_, apply_kron, dense_delta, kpsvd, linear_with_delta
from soka_serve.shapes import FactorShape

log = logging.getLogger(__name__)

PARTS = ("left", "right", "sigma")
KBIT_BACKENDS = ("bnb 8bit", "bnb 4bit")


def stack_difference(theta: Factors, initial: Factors) -> Factors:
    """K(theta) - K(initial) as one stack of 2r terms that is exactly zero where theta equals initial.

    Semantics: sigma L (x) R - sigma0 L0 (x) R0 = (sigma L - sigma0 L0) (x) R + sigma0 L0 (x) (R - R0), term by term.

    Stacking theta and -initial instead would leave the cancellation to the rounding of a long sum. Here it happens
    between the factors themselves: at step 0 one factor of every term is exactly 0, so the adapted model equals its
    base bit for bit in every dtype, and a low-precision GEMM afterwards rounds a small number, not a small difference
    of large ones. It costs the same. Differentiable; gradients are those of K(theta).

    Args:
        theta: r terms, any float dtype.
        initial: r terms of the same shape; cast to theta's dtype first, so that both are rounded alike.
    """
    sigma = theta.sigma[:, None, None]
    sigma_initial = initial.sigma.to(theta.sigma.dtype)[:, None, None]
    right_initial = initial.right.to(theta.right.dtype)
    scaled_initial = sigma_initial * initial.left.to(theta.left.dtype)
    left = torch.cat([sigma * theta.left - scaled_initial, scaled_initial])
    right = torch.cat([theta.right, theta.right - right_initial])
    return Factors(left=left, right=right, sigma=torch.ones(len(left), dtype=left.dtype, device=left.device))


def find_backend(layer: nn.Module) -> QuantizationBackend | None:
    """How a layer's weight is quantised; None where it is not. ValueError (PEFT's) for torchao without its config."""
    weight: Any = getattr(layer, "weight", None)
    if type(layer) is nn.Linear and type(weight.data) is Tensor:
        return None  # PEFT's look-up tries a dozen libraries
    return resolve_quantization_backend(layer)


class SokaLayer(BaseTunerLayer):  # type: ignore[misc]
    """Factors of every adapter on one base layer. `SokaLinear` adds the forward pass and merging."""

    base_layer: nn.Module
    soka_left: Any  # ParameterDict by adapter name, as the next two; Any because nn.Module types attributes loosely
    soka_right: Any
    soka_sigma: Any
    soka_left_initial: Any  # BufferDict by adapter name, as the next two
    soka_right_initial: Any
    soka_sigma_initial: Any

    adapter_layer_names = tuple(f"soka_{part}" for part in PARTS)
    other_param_names = tuple(f"soka_{part}_initial" for part in PARTS)

    def __init__(self, base_layer: nn.Module, module_name: str) -> None:
        self.base_layer = base_layer
        self.module_name = module_name
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        for name in self.other_param_names:
            # Buffers: constants, in the state dict, not among the parameters.
            setattr(self, name, BufferDict({}, persistent=True))
        self.quantization_backend = find_backend(base_layer)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._original: dict[str, Any] | None = None
        self._to_be_loaded: set[str] = set()
        self.out_features: int = base_layer.out_features  # type: ignore[assignment]
        self.in_features: int = base_layer.in_features  # type: ignore[assignment]

    # --- factors -------------------------------------------------------------------------------------------------

    def adapter_names(self) -> list[str]:
        """Names of the adapters that this layer has."""
        return list(self.soka_left.keys())

    def theta(self, adapter: str) -> Factors:
        """The trained factors (the parameters themselves, not copies)."""
        return Factors(left=self.soka_left[adapter], right=self.soka_right[adapter], sigma=self.soka_sigma[adapter])

    def initial(self, adapter: str) -> Factors | None:
        """The frozen initial factors, None where the adapter has none."""
        if adapter not in self.soka_left_initial:
            return None
        return Factors(
            left=self.soka_left_initial[adapter],
            right=self.soka_right_initial[adapter],
            sigma=self.soka_sigma_initial[adapter],
        )

    def delta(self, adapter: str, dtype: torch.dtype | None = None) -> Factors:
        """The terms that are added to the base: theta's, minus the initial ones where there are any.

        `dtype` is that of the factors before they are subtracted; None leaves it.

        Raises:
            CheckpointError: the adapter was made to be loaded, and never was.
        """
        self.check_loaded(adapter)
        theta, initial = self.theta(adapter).to(dtype), self.initial(adapter)
        return theta if initial is None else stack_difference(theta, initial.to(dtype))

    def set_factors(self, adapter: str, theta: Factors, initial: Factors | None) -> None:
        """Copy values into an adapter whose rank and shape are the same. Errors: ValueError when they are not."""
        for kind, source in (("", theta), ("_initial", initial)):
            if source is None:
                continue
            for part in PARTS:
                target, value = getattr(self, f"soka_{part}{kind}")[adapter], getattr(source, part)
                if target.shape != value.shape:
                    raise ValueError(
                        f"{self.module_name}: soka_{part}{kind} is {tuple(target.shape)}, got {tuple(value.shape)}"
                    )
                with torch.no_grad():
                    target.copy_(value)

    def update_layer(
        self,
        adapter: str,
        *,
        rank: int,
        shape: FactorShape,
        init: str | bool,
        initial: bool,
        seed: int,
        inference_mode: bool,
    ) -> int:
        """Give this layer an adapter; returns its rank, which is capped at the most terms the shape can have."""
        weight = self.get_base_layer().weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if rank > shape.max_rank:
            log.warning(
                "%s: %d terms asked for, the factor shape %s has at most %d",
                self.module_name,
                rank,
                list(shape),
                shape.max_rank,
            )
            rank = shape.max_rank
        factors = self._initial_values(rank, shape, init, seed, dtype)
        if init is False:
            self._to_be_loaded.add(adapter)
        for part in PARTS:
            value = getattr(factors, part)
            getattr(self, f"soka_{part}")[adapter] = nn.Parameter(value)
            if initial:
                getattr(self, f"soka_{part}_initial")[adapter] = value.detach().clone()
        if init is not False and self.soka_left[adapter].is_meta:
            raise SokaError(
                f"init_soka_weights = {init!r} needs memory for the factors, and low_cpu_mem_usage = True gives none",
                hint="leave low_cpu_mem_usage to loading a trained adapter",
            )
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)
        return rank

    def _initial_values(
        self, rank: int, shape: FactorShape, init: str | bool, seed: int, dtype: torch.dtype
    ) -> Factors:
        m, n, p, q = shape
        if init == "weights":
            weight = self._float_weight().to(dtype)
            if weight.is_meta or weight.shape != (self.out_features, self.in_features):
                raise SokaError(
                    f"{self.module_name}: init_soka_weights = 'weights' decomposes the weight, which is not in memory "
                    "here (offloaded, or sharded by DeepSpeed or tensor parallelism)",
                    hint="adapt the model before it is sharded, or build the factors with `soka-serve build`",
                )
            return kpsvd(weight, shape, rank, seed=seed).factors
        if init == "zero":
            generator = torch.Generator().manual_seed(seed ^ zlib.crc32(self.module_name.encode()))
            left = torch.empty(rank, m, n, dtype=dtype).uniform_(-(n**-0.5), n**-0.5, generator=generator)
            return Factors(left=left, right=torch.zeros(rank, p, q, dtype=dtype), sigma=torch.ones(rank, dtype=dtype))
        nan = float("nan")
        return Factors(
            left=torch.full((rank, m, n), nan, dtype=dtype),
            right=torch.full((rank, p, q), nan, dtype=dtype),
            sigma=torch.full((rank,), nan, dtype=dtype),
        )

    def check_loaded(self, adapter: str) -> None:
        """Refuse to compute with factors that were made to be loaded and never were.

        NaN stands for "not loaded": values may come by any way (PEFT, FSDP, load_state_dict), so they themselves are
        asked, once. NaN alone is not loud enough: attention on the CPU turns it into ordinary numbers.

        Raises:
            CheckpointError: the values are not there.
        """
        if adapter in self._to_be_loaded:
            if bool(torch.isnan(self.soka_sigma[adapter]).any()):
                raise CheckpointError(
                    f"{self.module_name}: the factors of adapter {adapter!r} were never loaded",
                    hint="init_soka_weights = False is for adapters whose weights are loaded afterwards",
                )
            self._to_be_loaded.discard(adapter)

    def resize(self, adapter: str, rank: int) -> None:
        """Make room for `rank` terms (values undefined); parameters keep their identity."""
        for name in (*self.adapter_layer_names, *self.other_param_names):
            store = getattr(self, name)
            if adapter in store:
                old = store[adapter]
                old.data = old.data.new_full((rank, *old.shape[1:]), float("nan"))

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the adapter to the base's device. PEFT's own also casts to the base's dtype, rounding the factors."""
        target = device if device is not None else self.get_base_layer().weight.device
        for name in (*self.adapter_layer_names, *self.other_param_names):
            store = getattr(self, name)
            if adapter_name in store and not store[adapter_name].is_meta and target.type != "meta":
                store[adapter_name] = store[adapter_name].to(target)

    # --- merging -------------------------------------------------------------------------------------------------

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The dense delta of one adapter: (out, in), in the factors' dtype, relative to the untouched base."""
        return dense_delta(self.delta(adapter, self._exact_dtype()), dtype=self.soka_left[adapter].dtype)

    def _exact_dtype(self) -> torch.dtype:
        """Float64, where the device has it: merged weights are rounded once, and terms may cancel."""
        return torch.float32 if self.base_layer.weight.device.type == "mps" else torch.float64

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put base + deltas into the base layer, rounded once, however many adapters are merged.

        The original weight is kept aside (in host memory; without a copy where it lies there already), so `unmerge`
        gives it back bit for bit, k-bit weights included. A k-bit base is dequantised and quantised again: small
        deltas get lost in that rounding, so merging into the full-precision checkpoint (`soka-serve merge`) is better.

        Args:
            safe_merge: refuse a result that is not finite and leave the base as it was.
            adapter_names: which adapters; None means the active ones.

        Raises:
            CheckpointError: with safe_merge, when a merged weight is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.soka_left]
        if not names:
            return
        if self.quantization_backend is not None:
            kind = self.quantization_backend.backend_name
            log.warning("%s: the merged weight is rounded to %s again", self.module_name, kind)
        current = self._snapshot()
        original = current if self._original is None else self._original
        self._restore(original)
        with torch.no_grad():
            base = self._float_weight()
            together = [*self.merged_adapters, *names]
            # One delta goes block by block into a copy; of several, the sum must not be rounded in between.
            merged = base.clone() if len(together) == 1 else base.to(self._exact_dtype())
            for name in together:
                add_delta_(merged, self.delta(name, self._exact_dtype()))
            merged = merged.to(base.dtype)
        if safe_merge and not bool(torch.isfinite(merged).all()):
            self._restore(current)
            raise CheckpointError(
                f"{self.module_name}: merging {', '.join(names)} gives values that are not finite; nothing was merged",
                hint="the adapter is broken, or was made for another base",
            )
        self._original = original
        self.set_base_weight(merged)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Take all merged adapters out again: the original weight comes back bit for bit."""
        if self._original is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._restore(self._original)
        self._original = None
        self.merged_adapters = []

    def _snapshot(self) -> dict[str, Any]:
        """What `_restore` needs to bring the base's weight back. k-bit weights are small and stay where they are."""
        base = self.get_base_layer()
        if self.quantization_backend is None:
            return {"weight": base.weight.data.to("cpu")}
        state = getattr(base, "state", None)  # Linear8bitLt holds the quantised weight there after the first forward
        return {
            "weight": base.weight,
            "attributes": dict(
                vars(base.weight)
            ),  # PEFT marks the old Params4bit as not quantised when it sets a new one
            "state": {name: getattr(state, name) for name in ("CB", "SCB") if hasattr(state, name)},
        }

    def _restore(self, snapshot: dict[str, Any]) -> None:
        base = self.get_base_layer()
        if self.quantization_backend is None:
            base.weight.data = snapshot["weight"].to(base.weight.device)
            return
        base.weight = snapshot["weight"]
        vars(base.weight).update(snapshot["attributes"])
        for name, value in snapshot["state"].items():
            setattr(base.state, name, value)

    def _float_weight(self) -> Tensor:
        """The base's weight (out, in), dequantised where it is quantised; the base's own tensor where it is not."""
        base: Any = self.get_base_layer()
        if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
            # On the CPU, bitsandbytes repacks a 4-bit weight in place at its first inference, and neither dequantises
            # the repacked bytes nor restores them rightly. The layer itself still knows what they mean.
            with torch.no_grad():
                result = base(torch.eye(self.in_features, dtype=torch.float32))
                return cast("Tensor", (result if base.bias is None else result - base.bias).T.contiguous())
        return cast("Tensor", self.get_base_weight()).detach()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """The delta is additive, so PEFT's `convert_to_lora` works."""
        return True


class SokaLinear(nn.Module, SokaLayer):
    """A linear layer (float, or bitsandbytes 8 or 4 bit) with SoKA adapters.

    Dtypes: the factors are float32 (float64 on a float64 base). Under autocast the delta is computed in autocast's
    dtype, otherwise in the wider of the input's and the factors' dtype; it is cast to the base's result and added.
    """

    def __init__(self, base_layer: nn.Module, adapter: str, *, module_name: str, **spec: Any) -> None:
        super().__init__()
        SokaLayer.__init__(self, base_layer, module_name)
        self._active_adapter = adapter
        self.update_layer(adapter, **spec)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        active = [name for name in cast("list[str]", self.active_adapters) if name in self.soka_left]
        if not self.merged and len(active) == 1 and not args and not kwargs and self._is_plain(x, active[0]):
            factors = self.delta(active[0])
            base: Any = self.base_layer
            return linear_with_delta(
                x,
                base.weight,
                base.bias,
                factors.left,
                factors.right,
                factors.sigma,
                trained_left=len(self.soka_sigma[active[0]]),  # those behind are theta0's (`stack_difference`)
            )
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if not self.merged:
            for adapter in active:
                result = result + self._apply_delta(x, adapter).to(result.dtype)
        return result

    def _is_plain(self, x: Tensor, adapter: str) -> bool:
        """Whether the base is a linear layer and nothing more, so that it can be computed together with the delta.

        Not so: other classes (quantised ones), hooks (offloading, sharding), autocast, or factors and inputs of other
        dtypes than the weight, where the delta has a dtype of its own.
        """
        base: Any = self.base_layer
        hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or hasattr(base, "_hf_hook")
        return (
            type(base) is nn.Linear
            and type(base.weight.data) is Tensor
            and not hooked
            and x.dtype == base.weight.dtype == self.soka_left[adapter].dtype
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _apply_delta(self, x: Tensor, adapter: str) -> Tensor:
        factors = self.delta(adapter)
        if not torch.is_autocast_enabled(x.device.type):  # apply_kron itself follows autocast
            x = x.to(torch.promote_types(x.dtype, factors.left.dtype))
        return apply_kron(x, factors.left, factors.right, factors.sigma)

    def extra_repr(self) -> str:
        parts = [
            f"{a}: rank {len(self.soka_sigma[a])}, shape {list(self.theta(a).shape)}" for a in self.adapter_names()
        ]
        if self.quantization_backend is not None:
            parts.append(f"base {self.quantization_backend.backend_name}")
        return "; ".join(parts)

    def __repr__(self) -> str:
        return "soka." + super().__repr__()
