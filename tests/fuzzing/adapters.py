"""SoKA adapters spoilt at random, through the reader, `inspect` and `merge`."""

from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open

from soka_serve.adapter.format import read_adapter, write_adapter
from soka_serve.base.checkpoint import Checkpoint
from soka_serve.builtin import base_directory
from soka_serve.errors import SokaError
from soka_serve.kron.shapes import FactorShape
from tests.fuzzing.limits import bounded, run
from tests.support import hostile_adapters as hostile
from tests.support.kron_oracle import draw_factors

KINDS = hostile.WEIGHTS | hostile.CONFIG | hostile.LOCK | hostile.SOKA
SLOW = ("300,000 tensors", "SoKA with 20,000 modules")  # read as a large model's: seconds each


def write_good_adapter(folder: Path) -> None:
    """An adapter of the embedded base, on three projections of its first layer."""
    checkpoint = Checkpoint.open(base_directory())
    factors = {}
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
        out_features, in_features = checkpoint.tensors[f"model.layers.0.{name}.weight"].shape
        shape = FactorShape(8, 8, out_features // 8, in_features // 8)
        factors[f"model.layers.0.{name}"] = draw_factors(shape, 2, dtype=torch.float32, scale=0.01)
    lock = {"base": {"name": "tiny", "sha256": checkpoint.sha256()}}
    write_adapter(folder, factors, base_model=str(base_directory()), lock=lock)


def check_adapter(folder: Path) -> bool:
    """A spoilt adapter is read with finite factors or refused, by reader, `inspect` and `merge` alike; a merge that
    fails leaves nothing, and one that does not leaves a whole model.

    Returns:
        Whether it could still be read.
    """
    read = None
    with suppress(SokaError), bounded():
        read = read_adapter(folder)
    if read is not None:
        for name in read.factors:
            delta = read.delta_factors(name)
            assert all(torch.isfinite(t).all() for t in (delta.left, delta.right, delta.sigma)), name
    with tempfile.TemporaryDirectory() as other:
        run("inspect", str(folder))
        out = Path(other) / "merged"
        done = run("merge", str(folder), "--base", "tiny", "--out", str(out), "--no-verify")
        if done.exit_code:
            assert not list(Path(other).iterdir()), list(Path(other).iterdir())
        else:
            assert read is not None, "merged what cannot be read"
            assert [path.name for path in Path(other).iterdir()] == ["merged"]
            with safe_open(out / "model.safetensors", framework="pt") as file:
                assert all(torch.isfinite(file.get_tensor(name)).all() for name in file.keys())  # noqa: SIM118
            json.loads((out / "config.json").read_text())
    return read is not None
