"""LoKr adapters, of PEFT and of LyCORIS, spoilt at random, through the plugin's readers as a server calls them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from soka_serve.adapter.format import CONFIG_FILE, KEY_PREFIX, WEIGHTS_FILE
from soka_serve.adapter.lokr import look_at_lokr
from soka_serve.errors import SokaError, is_printable
from soka_serve.io.budget import ReadingBudget
from soka_vllm.lycoris import look_at_lycoris
from tests.fuzzing.limits import bounded
from tests.fuzzing.spoil import spoil_files
from tests.support import hostile_adapters as hostile

KINDS = hostile.WEIGHTS | hostile.CONFIG | hostile.LOKR
_MODULES = ("layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj", "layers.1.mlp.down_proj")
# Of products and of whole factors, rank 4: none, those of rs_lora, of other dtypes and shapes.
_ALPHAS = st.builds(
    torch.tensor,
    st.sampled_from([0, 1, -1, 2, 8, 2**1.5, 4**1.5, 1e-300, 1e300, math.inf, math.nan, [1.0], [1.0, 2.0], []]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
_MESSAGE = 8000  # characters


def served() -> ReadingBudget:
    """As for a server of the embedded base."""
    return ReadingBudget(
        config_bytes=1 << 19, lock_bytes=1 << 18, header_bytes=1 << 19, tensors=300, values=10**7, pattern_seconds=1.0
    )


def write_good_lokr(folder: Path) -> None:
    """Two adapters: `peft` in PEFT's form, `lycoris` in LyCORIS's."""
    generator = torch.Generator().manual_seed(0)
    for kind, start, separator in (("peft", f"{KEY_PREFIX}model.", "."), ("lycoris", "lycoris_model_", "_")):
        tensors = {}
        for name in _MODULES:
            key = start + name.replace(".", separator)
            sizes = {"lokr_w1": (8, 8), "lokr_w2_a": (16, 4), "lokr_w2_b": (4, 16)}
            tensors |= {f"{key}.{part}": torch.randn(size, generator=generator) for part, size in sizes.items()}
            if kind == "lycoris":
                tensors[f"{key}.alpha"] = torch.tensor(1.0)
        (folder / kind).mkdir(parents=True)
        save_file(tensors, folder / kind / WEIGHTS_FILE)
    config = {"peft_type": "LOKR", "r": 4, "alpha": 2, "rank_pattern": {"v_proj": 4}, "alpha_pattern": {}}
    (folder / "peft" / CONFIG_FILE).write_text(json.dumps(config | {"target_modules": ["q_proj", "v_proj"]}))


def spoil_lokr(draw: st.DrawFn, folder: Path) -> None:
    """Alphas of LyCORIS's that are none, and one to three changes to the files of a LoKr adapter."""
    if not (folder / CONFIG_FILE).exists() and draw(st.booleans()):
        tensors = load_file(folder / WEIGHTS_FILE)
        for key in sorted(tensors):
            if key.endswith(".alpha"):
                tensors[key] = draw(_ALPHAS)
        save_file(tensors, folder / WEIGHTS_FILE)
        if draw(st.booleans()):
            return
    spoil_files(draw, folder, KINDS)


def check_lokr(folder: Path, kind: str) -> bool:
    """It is read with finite factors, or refused in a short message that a terminal shows as it is.

    Args:
        folder: of the adapter.
        kind: "peft" or "lycoris".

    Returns:
        Whether it could still be read.
    """
    try:
        with bounded():
            factors = (look_at_lokr if kind == "peft" else look_at_lycoris)(folder, served()).read()
    except SokaError as error:
        _check_message(error.message)
        return False
    for name, found in factors.items():
        assert all(bool(part.isfinite().all()) for part in (found.left, found.right, found.sigma)), name
    return True


def _check_message(message: str) -> None:
    assert len(message) < _MESSAGE, len(message)
    assert all(map(is_printable, message.split("\n"))), message
