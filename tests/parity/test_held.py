"""What a base in bits computes with, against the layers that bitsandbytes makes; and the start from what is lost."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from soka_serve.base.base import Base
from soka_serve.base.held import held_modules, held_weight
from soka_serve.base.model import Dtype, Quantize, load_base
from soka_serve.base.target_modules import resolve_targets
from soka_serve.builtin import base_directory
from soka_serve.compiler.init.candidate import TargetStatistics
from soka_serve.compiler.init.initialise import InitRun
from soka_serve.kron.shapes import FactorShape
from soka_serve.kron.weighting import InputMoments
from soka_serve.manifest.schema import Manifest
from tests.support import kron_oracle as oracle
from tests.support.tolerances import relative_error

pytest.importorskip("bitsandbytes", reason="k-bit bases need bitsandbytes (pip install -e '.[kbit]')")

NAME = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(("quantize", "dtype"), [("4bit", "auto"), ("8bit", "auto"), ("4bit", "bfloat16")])
def test_held_weights_are_those_of_the_layers(quantize: Quantize, dtype: Dtype) -> None:
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    base = Base(base_directory())
    model = load_base(base.directory, dtype, quantize)
    kinds = ("Linear4bit", "Linear8bitLt")
    layers = {name: layer for name, layer in model.named_modules() if type(layer).__name__ in kinds}
    assert layers.keys() == held_modules(base.directory, quantize)
    assert "lm_head" not in layers
    for name, layer in list(layers.items())[:7]:
        weight = base.weights.read(name)
        found = held_weight(weight, quantize, dtype)
        assert torch.equal(found, dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).float()), name
        assert 0 < (found - weight).norm() / weight.norm() < 0.5


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_nothing_is_held_without_bits(dtype: Dtype) -> None:
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    rounded = weight if dtype == "auto" else weight.bfloat16().float()
    assert torch.equal(held_weight(weight, "none", dtype), rounded)
    assert not held_modules(base_directory(), "none")


@pytest.mark.parametrize("weighed", [False, True])
def test_terms_are_the_best_of_what_is_lost(tmp_path: Path, weighed: bool) -> None:
    """Against an SVD in float64, of R(W - Q(W)) or, where the inputs' second moment is C = C1 kron C2, of
    R((W - Q(W)) C^(1/2)), whose roots are taken out of its leading part again: the weighted least squares in closed
    form. The terms are what is added, and nothing is subtracted."""
    base = Base(base_directory())
    rule = {"modules": ["q_proj"], "layers": [0], "init": "quantisation", "rank": {"policy": "fixed", "rank": 3}}
    manifest = Manifest.model_validate(
        {
            "schema": 1,
            "base": {"builtin": "tiny", "quantize": "4bit"},
            "adapt": [rule if weighed else rule | {"calibration_batches": 0}],
            "train": {"steps": 1, "data": {"builtin": "math"}},
        }
    )
    targets = resolve_targets(manifest, base.layout.modules)
    (target,) = targets
    shape = target.shape
    assert shape is not None
    assert bool(target.rule.batches) == weighed  # the inputs' metric is the default
    roots = [oracle.draw(size, size, seed=size) + torch.eye(size) for size in (shape.n, shape.q)]
    root = torch.kron(*roots) if weighed else torch.eye(shape.in_features, dtype=torch.float64)
    moments = InputMoments(shape.in_features)
    moments.accumulate(root.t())  # rows whose second moment is root root^T, over their number
    held = partial(held_weight, quantize="4bit", dtype="auto")
    (tmp_path / "scratch").mkdir()
    known = [TargetStatistics(target, moments=moments)]
    run = InitRun(targets, base, tmp_path / "scratch", statistics=lambda _: known, held=held, progress=False)
    started = run.initialise()
    (factors,) = started.factors.values()
    assert not started.initial_modules
    weight = base.weights.read(NAME)
    lost = weight.double() - held_weight(weight, "4bit").double()
    plain, weighted = (oracle.oracle_rearrangement(matrix, shape) for matrix in (lost, lost @ root))
    best, unweighed = (_leading(matrix, 3, shape) for matrix in (weighted, plain))
    found = oracle.oracle_delta(factors)
    least = float(torch.linalg.svdvals(weighted)[3:].norm())
    assert float(((lost - found) @ root).norm()) == pytest.approx(least, rel=1e-5)
    assert relative_error(found @ root, best) < (5e-3 if weighed else 1e-5)  # the moment is damped by 1e-3 of its mean
    if weighed:
        assert float(((lost - unweighed) @ root).norm()) > 1.02 * least
    assert float((lost - found).norm()) < float(lost.norm())


def _leading(rearranged: torch.Tensor, count: int, shape: FactorShape) -> torch.Tensor:
    """The terms of the largest singular values, as one matrix."""
    u, s, v = torch.linalg.svd(rearranged, full_matrices=False)
    terms = zip(u.t()[:count], s[:count], v[:count], strict=True)
    pairs = [size * torch.kron(a.view(shape.m, shape.n), b.view(shape.p, shape.q)) for a, size, b in terms]
    return torch.stack(pairs).sum(0)
