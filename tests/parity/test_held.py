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
from soka_serve.compiler.init.initialise import InitRun
from soka_serve.kron import dense_delta
from soka_serve.kron.factors import rearrange
from soka_serve.manifest.schema import Manifest

pytest.importorskip("bitsandbytes", reason="k-bit bases need bitsandbytes (pip install 'soka-serve[kbit]')")

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


def test_terms_are_the_best_of_what_is_lost(tmp_path: Path) -> None:
    """Against the SVD of R(W - Q(W)) in float64; they are what is added, and nothing is subtracted."""
    base = Base(base_directory())
    manifest = Manifest.model_validate(
        {
            "schema": 1,
            "base": {"builtin": "tiny", "quantize": "4bit"},
            "adapt": [
                {
                    **{"modules": ["q_proj"], "layers": [0], "init": "quantisation", "calibration_batches": 0},
                    "rank": {"policy": "fixed", "rank": 3},
                }
            ],
            "train": {"steps": 1, "data": {"builtin": "math"}},
        }
    )
    targets = resolve_targets(manifest, base.layout.modules)
    held = partial(held_weight, quantize="4bit", dtype="auto")
    (tmp_path / "scratch").mkdir()
    started = InitRun(targets, base, tmp_path / "scratch", held=held, progress=False).initialise()
    (factors,) = started.factors.values()
    assert not started.initial_modules
    weight = base.weights.read(NAME)
    lost = weight.double() - held_weight(weight, "4bit").double()
    u, s, v = torch.linalg.svd(rearrange(lost, factors.shape), full_matrices=False)
    expected = (u[:, :3] * s[:3]) @ v[:3]
    torch.testing.assert_close(
        rearrange(dense_delta(factors.to(torch.float64)), factors.shape), expected, rtol=1e-4, atol=1e-5
    )
    assert float((lost - dense_delta(factors.to(torch.float64))).norm()) < float(lost.norm())
