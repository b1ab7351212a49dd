"""SoKA: sums of Kronecker products, sigma * left ⊗ right, on a base that stays as it is (arXiv:2506.15251)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from soka_serve.compiler.methods.method import DenseOutput, Method, StartingPoint, Terms, Trainable
from soka_serve.kron.shapes import balanced_shape

if TYPE_CHECKING:
    from soka_serve.base.modules import Module


@dataclass(frozen=True)
class Soka(Method):
    """Kronecker adapters; ranks, shapes and starting factors come from [[adapt]] through stage `init`."""

    ranked: ClassVar[bool] = False
    kronecker: ClassVar[bool] = True
    needs_plugin: ClassVar[bool] = True

    def parameters(self, module: Module, rank: int) -> int:
        return balanced_shape(module.out_features, module.in_features).parameters(rank)

    def build(self, model: Any, start: StartingPoint) -> Trainable:
        from soka_serve.compiler.methods.adapter_files import ADAPTER
        from soka_serve.peft import build_soka_model, soka_layers

        adapted = build_soka_model(
            model,
            start.factors,
            initial=bool(start.initial or start.cut),
            base_model=start.base_name,
            forms=start.forms,
            soka_quantize=start.quantize,
        )
        for name, layer in soka_layers(adapted).items():
            if name in start.cut:
                layer.set_factors(ADAPTER, start.factors[name], start.cut[name])
            elif layer.initial(ADAPTER) is not None and name not in start.initial:
                # One flag serves the whole adapter: a module that starts from its own delta subtracts zero.
                layer.soka_sigma_initial[ADAPTER].data.zero_()
        _tell_of_start(adapted, start)
        return adapted

    def restore(self, model: Any, start: StartingPoint, checkpoint: Path) -> Trainable:
        from soka_serve.compiler.methods.adapter_files import load_adapter

        adapted = load_adapter(model, checkpoint)  # whose ranks may be smaller than the start's: terms are pruned
        _tell_of_start(adapted, start)
        return adapted

    def export(self, trained: Path, out: Path, dtype: str, terms: Terms = "all") -> float:
        from soka_serve.adapter.export import export

        energy = None if isinstance(terms, str) else terms
        rank: Literal["trained"] | None = "trained" if terms == "trained" else None
        return export(trained, out, dtype=dtype, rank=rank, energy=energy).dropped_energy_frac

    def merge(self, source: Path, merging: DenseOutput) -> None:
        from soka_serve.compiler.merge.merge import MergeRun

        MergeRun([(source, 1.0)], merging.base, merging.out, merging.dtype, progress=merging.progress).run()


def _tell_of_start(adapted: Any, start: StartingPoint) -> None:
    """Tell layers what a resumed run no longer shows: whether sigma is trained, and what initial factors are."""
    from soka_serve.compiler.methods.adapter_files import ADAPTER
    from soka_serve.peft import soka_layers
    from soka_serve.peft.optimizer import sigma_repeats

    for name, layer in soka_layers(adapted).items():
        layer.sigma_repeats[ADAPTER] = sigma_repeats(
            start.factors[name], subtracted=name in start.initial, form=layer.form(ADAPTER)
        )
        (layer.apart.discard if name in start.initial else layer.apart.add)(ADAPTER)
