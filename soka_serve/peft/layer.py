"""One adapted projection: y = W x + K(theta) x - K(initial) x.

K(theta) = sum_k sigma_k kron(left_k, right_k). The base weight W is never rewritten by the adapter (only by an explicit
`merge`, which keeps the original aside), so it stays shareable, quantisable and bit-identical.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from soka_serve.errors import CheckpointError, SokaError
from soka_serve.kron import Factors, apply_kron, dense_delta, kpsvd, linear_with_delta, stack_terms
from soka_serve.kron.factors import fold_difference, random_terms, stack_difference, typical_entry
from soka_serve.kron.shapes import FactorShape
from soka_serve.peft.merging import MergingLayer
from soka_serve.peft.parts import PARTS, Parts, part_of
from soka_serve.trained import PLAIN, TENSORS, Form

if TYPE_CHECKING:
    from soka_serve.kron.apply import Terms
    from soka_serve.peft.config import SokaConfig

log = logging.getLogger(__name__)

BASE = "__base__"  # PEFT's name, in `adapter_names`, for rows that no adapter changes


class SokaLayer(MergingLayer):
    """Factors of every adapter on one base layer. `SokaLinear` adds the forward pass."""

    soka_left: Parts
    soka_right: Parts
    soka_sigma: Parts
    soka_left_initial: Parts
    soka_right_initial: Parts
    soka_sigma_initial: Parts
    soka_dropout: nn.ModuleDict

    factor_names = tuple(f"soka_{part}" for part in PARTS)
    adapter_layer_names = (*factor_names, *(f"soka_{name}" for name in TENSORS))
    initial_names = tuple(f"soka_{part}_initial" for part in PARTS)
    other_param_names = (*initial_names, "soka_dropout")

    def __init__(self, base_layer: nn.Module, module_name: str) -> None:
        super().__init__(base_layer, module_name)
        for name in self.adapter_layer_names:
            setattr(self, name, Parts(trained=True))
        for name in self.initial_names:
            setattr(self, name, Parts(trained=False))
        self.soka_dropout = nn.ModuleDict()
        self._to_be_loaded: set[str] = set()
        self._mending: set[str] = set()
        self._forms: dict[str, Form] = {}
        self.sigma_repeats: dict[str, bool] = {}
        """By adapter, what is known of its start: whether sigma only repeats the size of Left and Right."""

        self.apart: set[str] = set()
        """Adapters whose initial factors, where they have some, are not what they started from: terms that are taken
        off the weight, or sigmas of zero, beside other modules whose start is subtracted."""
        self._held: dict[str, set[str]] = {}

    # --- factors -------------------------------------------------------------------------------------------------

    def adapter_names(self) -> list[str]:
        return list(self.soka_left)

    def stores(self, adapter: str) -> dict[str, Parts]:
        """The containers that hold tensors of an adapter, by name: its factors, what its form adds, initial factors."""
        names = (*self.adapter_layer_names, *self.initial_names)
        return {name: store for name in names if adapter in (store := cast("Parts", getattr(self, name)))}

    def form(self, adapter: str) -> Form:
        """What of an adapter is trained."""
        return self._forms.get(adapter, PLAIN)

    def mends(self, adapter: str) -> bool:
        """Whether an adapter began with what quantising the base loses (`soka_quantize`)."""
        return adapter in self._mending

    def note_bits(self, adapter: str, bits: str | None) -> None:
        """Note of which quantised base an adapter mends the loss (`soka_quantize`), if of any."""
        (self._mending.discard if bits is None else self._mending.add)(adapter)

    def hold(self, adapter: str, names: Collection[str]) -> None:
        """Leave tensors of an adapter, by their containers' names, as they are, also when PEFT thaws the adapter."""
        self._held[adapter] = set(names)
        self._freeze()

    def is_trained(self, adapter: str) -> bool:
        """Whether an adapter is trained, or would be but for what is held."""
        held = self._held.get(adapter, set())
        still = held | {f"soka_{part}" for part in self.form(adapter).frozen} | set(self.initial_names)
        others = [store[adapter] for name, store in self.stores(adapter).items() if name not in still]
        return any(other.requires_grad for other in others) or (not others and adapter in self.active_adapters)

    def release(self, adapter: str) -> None:
        """Train again what was held, if the adapter is trained at all."""
        trained = self.is_trained(adapter)
        for name in self._held.pop(adapter, set()) if trained else ():
            getattr(self, name)[adapter].requires_grad_(True)
        self._freeze()

    def set_form(self, adapter: str, form: Form) -> None:
        """Train of an adapter what a form says, if it is trained at all."""
        trained = any(store[adapter].requires_grad for store in self.stores(adapter).values())
        for part in self.form(adapter).frozen:
            getattr(self, f"soka_{part}")[adapter].requires_grad_(trained)
        self._forms[adapter] = form
        self._freeze()

    def _factors(self, adapter: str) -> Factors:
        """Left, right and sigma (the parameters themselves, not copies), without what the form adds."""
        return Factors(left=self.soka_left[adapter], right=self.soka_right[adapter], sigma=self.soka_sigma[adapter])

    def _added(self, adapter: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The tensors beside left, right and sigma, by name."""
        if not self.form(adapter).choices:
            return {}
        stores = {name: getattr(self, f"soka_{name}") for name in TENSORS}
        return {name: store[adapter].to(dtype=dtype) for name, store in stores.items() if adapter in store}

    def has_added(self, adapter: str) -> bool:
        """Whether an adapter's form has tensors beside left, right and sigma."""
        return bool(self._added(adapter))

    def theta(self, adapter: str) -> Factors:
        """The terms as they are trained, with what the form adds; without such, the parameters themselves."""
        return self.form(adapter).apply(self._factors(adapter), self._added(adapter))

    def initial(self, adapter: str) -> Factors | None:
        """The frozen initial factors, one for each term of theta; None where the adapter has none."""
        start = self._start(adapter)
        added = None if start is None else self.theta(adapter).terms(slice(start.rank, None))
        return start if start is None or added is None or not added.rank else stack_terms(start, added, signs=(1, 0))

    def began(self, adapter: str) -> Factors | None:
        """The initial factors where theta started from them; None where it did not, or the adapter has none."""
        return None if adapter in self.apart else self.initial(adapter)

    def _start(self, adapter: str) -> Factors | None:
        """The frozen initial factors, without terms for what the form adds."""
        if adapter not in self.soka_left_initial:
            return None
        return Factors(*(getattr(self, name)[adapter] for name in self.initial_names))

    def delta(self, adapter: str, dtype: torch.dtype | None = None) -> Factors:
        """The terms that are added to the base: theta's, minus the initial ones where there are any.

        `dtype` is that of the factors before they are subtracted; None leaves it.

        Raises:
            CheckpointError: the adapter was made to be loaded, and never was.
        """
        self.check_loaded(adapter)
        form, factors, initial = self.form(adapter), self._factors(adapter).to(dtype), self._start(adapter)
        if initial is not None and form.frozen & {"left", "right"}:  # which are the same in both
            same = {part: part in form.frozen for part in ("left", "right")}
            factors = fold_difference(factors, initial.to(dtype), **same)
        elif initial is not None:
            factors = stack_difference(factors, initial.to(dtype))
        return form.apply(factors, self._added(adapter, dtype))

    def set_factors(self, adapter: str, theta: Factors, initial: Factors | None) -> None:
        """Copy values into an adapter whose rank and shape are the same; what its form adds starts again.

        Errors: ValueError when rank or shape are not the same.
        """
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
        for name, value in self.form(adapter).start(theta).items():
            with torch.no_grad():
                getattr(self, f"soka_{name}")[adapter].copy_(value)

    def spec(self, adapter: str) -> dict[str, Any]:
        """What `soka_modules` says of this layer."""
        left, right = self.soka_left[adapter], self.soka_right[adapter]
        return {"rank": len(left), "shape": [*left.shape[1:], *right.shape[1:]], **self.form(adapter).spec()}

    def update_layer(self, adapter: str, *, rank: int, shape: FactorShape, config: SokaConfig) -> None:
        """Give this layer an adapter. Its rank is capped at the most terms the shape can have.

        Args:
            adapter: name of the adapter.
            rank, shape: those of this module; `config` has them for all modules.
            config: says how the factors start, and whether they are trained.
        """
        dtype = torch.float64 if self.get_base_layer().weight.dtype == torch.float64 else torch.float32
        init = config.init_soka_weights
        if rank > shape.max_rank:
            asked = self.module_name, rank, list(shape), shape.max_rank
            log.warning("%s: %d terms asked for, the factor shape %s has at most %d", *asked)
            rank = shape.max_rank
        self._forms[adapter] = config.form_of(self.module_name)
        self._held.pop(adapter, None)
        self.note_bits(adapter, config.soka_quantize)
        factors = self._initial_values(rank, shape, config, dtype)
        for part in PARTS:
            value = getattr(factors, part)
            getattr(self, f"soka_{part}")[adapter] = value
            if config.soka_initial:
                getattr(self, f"soka_{part}_initial")[adapter] = value.detach().clone()
        for name, value in self.form(adapter).start(factors).items():
            getattr(self, f"soka_{name}")[adapter] = (
                value if init is not False else torch.full_like(value, float("nan"))
            )
        if config.soka_dropout > 0:
            self.soka_dropout[adapter] = nn.Dropout(config.soka_dropout)
        if self.soka_left[adapter].is_meta and init == "weights":
            raise SokaError(
                f"init_soka_weights = {init!r} needs memory for the factors, and low_cpu_mem_usage = True gives none",
                hint="leave low_cpu_mem_usage to loading a trained adapter",
            )
        if init is False:
            self._to_be_loaded.add(adapter)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _initial_values(self, rank: int, shape: FactorShape, config: SokaConfig, dtype: torch.dtype) -> Factors:
        if config.init_soka_weights is False:
            m, n, p, q = shape
            sizes = ((rank, m, n), (rank, p, q), (rank,))
            return Factors(*(torch.full(size, float("nan"), dtype=dtype) for size in sizes))
        weight, init = self.float_weight().to(dtype), config.init_soka_weights
        is_whole = not weight.is_meta and weight.shape == (self.out_features, self.in_features)
        if init == "weights" and not is_whole:
            raise SokaError(
                f"{self.module_name}: init_soka_weights = 'weights' decomposes the weight, which is not in memory "
                "here (offloaded, or sharded by DeepSpeed or tensor parallelism)",
                hint="adapt the model before it is sharded, or build the factors with `soka-serve build`",
            )
        size = config.init_scale * typical_entry(float(weight.norm()) if is_whole else 0.0, shape)
        if init == "weights":
            return _evened(kpsvd(weight, shape, rank, seed=config.seed).factors.with_unit_rms().with_size(size), size)
        seed = config.seed ^ zlib.crc32(self.module_name.encode())
        generator = torch.Generator().manual_seed(seed) if init == "zero" else None
        return _evened(random_terms(rank, shape, size, generator, zero=init == "zero"), size).to(dtype)

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

    def resize(self, adapter: str, rank: int, shape: Sequence[int]) -> None:
        """Make room for `rank` terms of a factor shape (values undefined); parameters keep their identity."""
        sizes = self.form(adapter).sizes(rank, FactorShape(*shape))
        for name, store in self.stores(adapter).items():
            old = store[adapter]
            old.data = old.data.new_full(sizes[part_of(name)], float("nan"))

    def drop_initial(self, adapter: str) -> None:
        """Leave an adapter its trained factors alone, all of them: they are the delta from now on."""
        self.release(adapter)
        self._held.pop(adapter, None)
        self.set_form(adapter, PLAIN)
        self.apart.discard(adapter)
        for name in (*self.initial_names, *(f"soka_{name}" for name in TENSORS)):
            store = getattr(self, name)
            if adapter in store:
                del store[adapter]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        self._freeze()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze()

    def _freeze(self) -> None:
        """PEFT trains all tensors of an active adapter: take those out that are not to be."""
        for adapter, form in self._forms.items():
            names = {f"soka_{part}" for part in form.frozen} | self._held.get(adapter, set())
            for name in names:
                if adapter in (store := getattr(self, name)):
                    store[adapter].requires_grad_(False)

    def cast(self, adapter: str) -> None:
        """Give an adapter's factors the dtype that the base computes in, where that is a floating one."""
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if dtype is not None and dtype.is_floating_point:
            for store in self.stores(adapter).values():
                store.cast(adapter, dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the adapter to the base's device. PEFT's own also casts to the base's dtype, rounding the factors."""
        target = device if device is not None else self.get_base_layer().weight.device
        for store in self.stores(adapter_name).values():
            if not store[adapter_name].is_meta and target.type != "meta":
                store[adapter_name] = store[adapter_name].to(target)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The dense delta of one adapter, relative to the untouched base, as the base stores its weight.

        (out, in), in the factors' dtype; (in, out) for transformers' Conv1D.
        """
        dense = dense_delta(self.delta(adapter, self._exact_dtype()), dtype=self.soka_left[adapter].dtype)
        return self._oriented(dense)


class SokaLinear(nn.Module, SokaLayer):
    """A linear layer (float, bitsandbytes 8 or 4 bit, or transformers' Conv1D) with SoKA adapters.

    Dtypes: the factors are float32 (float64 on a float64 base), unless PEFT was told to leave the base's dtype. Under
    autocast the delta is computed in autocast's dtype, otherwise in the wider of the input's and the factors' dtype; it
    is cast to the base's result and added.
    """

    def __init__(self, base_layer: nn.Module, adapter: str, *, module_name: str, **spec: Any) -> None:
        super().__init__()
        SokaLayer.__init__(self, base_layer, module_name)
        self._active_adapter = adapter
        self.update_layer(adapter, **spec)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if adapter_names is not None:
            self._check_adapter_names(x, adapter_names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        active = [name for name in cast("list[str]", self.active_adapters) if name in self.soka_left]
        if not self.merged and len(active) == 1 and not args and not kwargs and self._is_plain(x, active[0]):
            terms, initial = self.terms(active[0])
            base: Any = self.base_layer
            return linear_with_delta(x, base.weight, base.bias, terms, initial=initial)
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if not self.merged:
            for adapter in active:
                result = result + self._apply_delta(x, adapter).to(result.dtype)
        return result

    def _check_adapter_names(self, x: Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively, in {self.module_name}. (Shared experts see "
                "the tokens of all rows in one dimension; adapt other modules, or batch each adapter's rows apart.)"
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """Each row of the batch with its own adapter; rows of `__base__`, or whose adapter skips this layer, without.

        Args:
            x: (batch, ..., in).
            adapter_names: one name per row.
        """
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for adapter in dict.fromkeys(adapter_names):
            if adapter == BASE or adapter not in self.soka_left:
                continue
            rows = torch.tensor([i for i, name in enumerate(adapter_names) if name == adapter], device=x.device)
            delta = self._apply_delta(x[rows], adapter)
            result = result.index_add(0, rows, delta.to(result.dtype))
        return result

    def _is_plain(self, x: Tensor, adapter: str) -> bool:
        """Whether the base is a linear layer and nothing more, so that it can be computed together with the delta.

        Not so: other classes (quantised ones), hooks (offloading, sharding), dropout, or, but for autocast, factors and
        inputs of other dtypes than the weight, where the delta has a dtype of its own.
        """
        base: Any = self.base_layer
        if type(base) is not nn.Linear or (self.training and adapter in self.soka_dropout):
            return False
        hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or hasattr(base, "_hf_hook")
        alike = x.dtype == base.weight.dtype == self.soka_left[adapter].dtype
        autocast = torch.is_autocast_enabled(x.device.type) and base.weight.is_floating_point()
        return type(base.weight.data) is Tensor and not hooked and (alike or autocast)

    def _apply_delta(self, x: Tensor, adapter: str) -> Tensor:
        terms, initial = self.terms(adapter)
        if not torch.is_autocast_enabled(x.device.type):  # apply_kron itself follows autocast
            x = x.to(torch.promote_types(x.dtype, terms[0].dtype))
        if adapter in self.soka_dropout:
            x = self.soka_dropout[adapter](x)
        return apply_kron(x, *terms, initial=initial)

    def terms(self, adapter: str) -> tuple[Terms, Terms | None]:
        """Left, right and sigma of what is applied, and those to subtract where there are any; checked to be loaded.

        What a form adds, or takes out of training, is subtracted here already.
        """
        self.check_loaded(adapter)
        if self.form(adapter).choices:
            delta = self.delta(adapter)
            return (delta.left, delta.right, delta.sigma), None
        theta, initial = (
            cast("Terms", tuple(store[adapter] for name in names if adapter in (store := getattr(self, name))))
            for names in (self.factor_names, self.initial_names)
        )
        return theta, initial or None

    def extra_repr(self) -> str:
        parts = []
        for adapter in self.adapter_names():
            spec = self.spec(adapter)
            parts.append(f"{adapter}: rank {spec['rank']}, shape {spec['shape']}")
        if self.quantization_backend is not None:
            parts.append(f"quantization_backend='{self.quantization_backend.backend_name}'")
        return "; ".join(parts)

    def __repr__(self) -> str:
        return "soka." + super().__repr__()


def _evened(terms: Factors, size: float) -> Factors:
    """The same delta with sigmas about 1: with one rate for all, as LoRA is trained, Left and Right then move."""
    root = math.sqrt(size)
    return Factors(terms.left * root, terms.right * root, terms.sigma / size)
