"""CDKA: Kronecker components of designed dimensions, lambda sum_i B_i ⊗ A_i (arXiv:2602.01267).

B_i is (out / r1, r2) and starts at zero; A_i is (r1, in / r2) and starts as LoRA's A does, uniform within 1 over the
root of its columns. lambda = alpha / sqrt(rank * r2), with alpha = scale * rank; rsLoRA is r1 = r2 = 1. r1 = r2 = 2 as
in the script of the authors (github.com/rainstonee/CDKA), which gives as many parameters as LoRA has at the same rank.
Both factors are trained at one rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from soka_serve.compiler.methods.lora import lora_parameters
from soka_serve.compiler.methods.method import StartingPoint, Trainable
from soka_serve.compiler.methods.soka import Soka
from soka_serve.errors import PlanError

if TYPE_CHECKING:
    import torch

    from soka_serve.base.modules import Module
    from soka_serve.kron import Factors

R1 = R2 = 2


@dataclass(frozen=True)
class Cdka(Soka):
    """CDKA in SoKA's layers: sigma is lambda, and stays as it is."""

    ranked: ClassVar[bool] = True
    kronecker: ClassVar[bool] = False
    scaled: ClassVar[bool] = True

    def parameters(self, module: Module, rank: int) -> int:
        return lora_parameters(module, rank)  # r1 = r2

    def build(self, model: Any, start: StartingPoint) -> Trainable:
        from soka_serve.peft import build_soka_model, soka_layers

        modules = {name: _components(name, model.get_submodule(name).weight, start) for name in start.targets}
        adapted = build_soka_model(model, modules, initial=False, base_model=start.base_name)
        for layer in soka_layers(adapted).values():
            layer.soka_sigma.requires_grad_(False)
        return adapted

    def optimizer(self, model: Any, rate: float, weight_decay: float) -> torch.optim.Optimizer:
        from torch.optim import AdamW

        trained = [p for p in model.parameters() if p.requires_grad]
        return AdamW(trained, lr=rate, weight_decay=weight_decay, fused=True)


def _components(name: str, weight: torch.Tensor, start: StartingPoint) -> Factors:
    """The components of one module at step 0."""
    import torch

    from soka_serve.kron import Factors

    out_features, in_features = weight.shape
    if out_features % R1 or in_features % R2:
        raise PlanError(
            f"{name}: train.method = 'cdka' halves both sides of a weight; this one is {out_features} x {in_features}"
        )
    rank, columns = start.rank, in_features // R2
    bound = 1 / math.sqrt(columns)
    return Factors(
        left=torch.zeros(rank, out_features // R1, R2),
        right=torch.empty(rank, R1, columns).uniform_(-bound, bound),
        sigma=torch.full((rank,), start.scale * rank / math.sqrt(rank * R2)),
    )
