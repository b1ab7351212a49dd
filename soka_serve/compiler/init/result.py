"""What stage `init` decides: per module its rank, shape and spectrum, and the factors that training starts from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from soka_serve.kron import Factors
from soka_serve.kron.shapes import FactorShape
from soka_serve.trained import PARTS, Form

_THETA, _CUT = "", "cut_"  # what keys of init.safetensors have before the part


@dataclass(frozen=True)
class ModuleInit:
    """What was decided for one module.

    `sigma` is the candidate pool's spectrum, descending, whose squares are energies, and empty where factors are random
    and the rank is fixed; `total_energy` is that of all that
    was decomposed: the squared Frobenius norm of the weight, the delta or the gradient, or, where activations weigh the
    weight, the mean squared norm of its outputs. Factors of the start are scaled otherwise (`[[adapt]] scale`).
    `trained` are the choices of its form.
    """

    module: str
    layer: int | None
    out_features: int
    in_features: int
    factor_shape: FactorShape
    init: str
    policy: str
    rank: int
    sigma: tuple[float, ...]
    total_energy: float
    trained: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def form(self) -> Form:
        """What of the factors is trained."""
        return Form(self.trained)

    @property
    def parameters(self) -> int:
        """Trainable parameters: r(mn + pq + 1), arXiv:2506.15251, but for factors that are not trained."""
        return self.form.parameters(self.rank, self.factor_shape)

    @property
    def projection(self) -> str:
        """The last part of the name, such as `q_proj`."""
        return self.module.rpartition(".")[2]

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's (out, in)."""
        return self.out_features, self.in_features

    def shares(self) -> list[float]:
        """Share of the total energy per candidate term; empty when there is no usable spectrum."""
        energy = [s * s for s in self.sigma]
        total = self.total_energy if self.total_energy > 0 else sum(energy)
        if not (math.isfinite(total) and total > 0):
            return []
        return [e / total for e in energy]

    def captured_frac(self) -> float | None:
        """Share of the energy in the chosen terms, or None when the spectrum cannot tell."""
        shares = self.shares()
        captured = sum(shares[: self.rank])
        return captured if len(shares) >= self.rank and shares and math.isfinite(captured) else None


@dataclass(frozen=True)
class Initialisation:
    """Factors at step 0 (theta) for every adapted module; modules of rank 0 are left out of `factors`."""

    modules: tuple[ModuleInit, ...]
    factors: dict[str, Factors]
    initial_modules: frozenset[str] = field(default_factory=frozenset)
    """Modules whose theta0 is subtracted."""
    cut: dict[str, Factors] = field(default_factory=dict)
    """Terms that are taken off modules' weights, as many as are trained."""

    @property
    def forms(self) -> dict[str, Form]:
        """What is trained of the modules of which not everything is."""
        return {m.module: m.form for m in self.modules if m.rank and m.trained}

    def write(self, directory: Path) -> None:
        """Write `init.safetensors` and `init.json` into an existing directory."""
        tensors: dict[str, torch.Tensor] = {}
        for kind, terms in ((_THETA, self.factors), (_CUT, self.cut)):
            for name, factors in terms.items():
                tensors |= {f"{name}.{kind}{part}": getattr(factors, part).contiguous() for part in PARTS}
        save_file(tensors, directory / "init.safetensors", metadata={"format": "pt"})
        modules = [asdict(m) for m in self.modules]
        for module in modules:
            if not module["trained"]:
                del module["trained"]
        listing = {"modules": modules, "initial": sorted(self.initial_modules)}
        (directory / "init.json").write_text(json.dumps(listing))

    @classmethod
    def read(cls, directory: Path) -> Initialisation:
        """Read what `write` wrote."""
        listing = json.loads((directory / "init.json").read_text())
        modules = tuple(
            ModuleInit(**m | {"factor_shape": FactorShape(*m["factor_shape"]), "sigma": tuple(m["sigma"])})
            for m in listing["modules"]
        )
        found: dict[str, dict[str, Factors]] = {_THETA: {}, _CUT: {}}
        with safe_open(directory / "init.safetensors", framework="pt") as file:
            keys = set(file.keys())
            for name, kind in ((m.module, kind) for m in modules if m.rank for kind in found):
                if kind == _THETA or f"{name}.{kind}{PARTS[0]}" in keys:
                    found[kind][name] = Factors(*(file.get_tensor(f"{name}.{kind}{part}") for part in PARTS))
        return cls(modules, found[_THETA], frozenset(listing["initial"]), found[_CUT])
