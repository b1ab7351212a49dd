"""Builds from starts that are no components of the weight, interrupted while they train, end as if they were not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import soka_serve
from soka_serve.adapter.format import read_adapter, write_adapter
from soka_serve.base.base import Base
from soka_serve.builtin import base_directory
from soka_serve.compiler.init.result import Initialisation
from soka_serve.kron.shapes import balanced_shape
from tests.support import kron_oracle as oracle
from tests.support.builds import same_tensors
from tests.support.training import interrupted_at

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
MANIFEST = """\
schema = 1
name = "small"
eval = {{ limit = 0 }}
output = {{ write = ["adapter"], report = false }}
[base]
builtin = "tiny"
{base}
[[adapt]]
modules = ["{modules[0]}", "{modules[1]}"]
{rule}
[train]
steps = 4
save_every = 2
batch_size = 2
weight_decay = 0.1
data = {{ builtin = "math", limit = 16 }}
"""
TWO = 'rank = { policy = "fixed", rank = 2 }'


@pytest.mark.parametrize(
    ("base", "rule", "moved"),
    [
        ("", f'init = "gradient"\nright = "dct"\n{TWO}', {"left", "sigma"}),
        ("", f'init = "truncated"\n{TWO}', {"left", "right"}),
        ("", 'init = "adapter"\nadapter = "first"', {"left", "right", "sigma"}),
        ("", f'init = "nystrom"\n{TWO}', {"left", "right"}),
        # Its terms have the core in Right.
        ("", f'init = "nystrom"\ncore = true\n{TWO}', {"right", "sigma"}),
        ("", f'init = "weights"\ncomponents = "minor"\n{TWO}', {"left", "right"}),
        ("", f'init = "gradient"\n{TWO}', {"left", "right"}),
        ('quantize = "4bit"', f'init = "quantisation"\n{TWO}', {"left", "right", "sigma"}),
        ('quantize = "8bit"', f'init = "quantisation"\ncalibration_batches = 0\n{TWO}', {"left", "right", "sigma"}),
    ],
    ids=["cosines", "truncated", "adapter", "nystrom", "core", "minor", "gradient", "4bit", "8bit"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:MatMul8bitLt:UserWarning")
def test_an_interrupted_build_ends_with_the_same_weights(tmp_path: Path, base: str, rule: str, moved: set[str]) -> None:
    if base:
        pytest.importorskip("bitsandbytes", reason="k-bit bases need bitsandbytes (pip install -e '.[kbit]')")
    sizes = {m.name: (m.out_features, m.in_features) for m in Base(base_directory()).layout.modules}
    shapes = {name: balanced_shape(*sizes[name]) for name in MODULES}
    terms = {n: oracle.draw_factors(s, 2, scale=0.01).to(torch.float32) for n, s in shapes.items()}
    write_adapter(tmp_path / "first", terms, base_model="tiny")
    manifest = tmp_path / "small.toml"
    manifest.write_text(MANIFEST.format(base=base, modules=MODULES, rule=rule))

    whole = soka_serve.build(manifest, out=tmp_path / "whole", progress=False)
    with interrupted_at(3):
        soka_serve.build(manifest, out=tmp_path / "cut", progress=False)
    assert list((tmp_path / "cut").glob(".cache/small/tune-*/checkpoint-2"))
    resumed = soka_serve.build(manifest, out=tmp_path / "cut", progress=False)
    assert resumed.ran[0] == "tune"
    adapters = [str(result.adapter) for result in (whole, resumed)]
    assert same_tensors(*(Path(adapter) / "adapter_model.safetensors" for adapter in adapters))

    (cached,) = (tmp_path / "whole").glob(".cache/small/init-*")
    (tuned,) = (tmp_path / "whole").glob(".cache/small/tune-*/adapter")
    start, trained = Initialisation.read(cached).factors, read_adapter(tuned).factors
    assert start.keys() == trained.keys() == set(MODULES)
    for name, factors in start.items():
        parts = ("left", "right", "sigma")
        assert {p for p in parts if not torch.equal(getattr(factors, p), getattr(trained[name], p))} == moved, name
