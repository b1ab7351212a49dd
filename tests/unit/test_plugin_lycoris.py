"""LoKr in LyCORIS's own files: what has one meaning is read, the rest is refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from soka_serve.errors import CheckpointError
from soka_serve.kron import dense_delta
from soka_vllm.lycoris import find_lycoris, read_lycoris, unflatten

FIRST, SECOND = "lycoris_model_layers_0_self_attn_q_proj.", "lycoris_model_layers_0_mlp_down_proj."
NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.norm"]


def tensors() -> dict[str, torch.Tensor]:
    """As `save_weights` writes them: two whole factors, whose alpha means nothing, and two products of rank 2."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        FIRST + "alpha": torch.tensor(7),
        FIRST + "lokr_w1": normal(2, 3),
        FIRST + "lokr_w2": normal(6, 4),
        SECOND + "alpha": torch.tensor(2.0),
        SECOND + "lokr_w1_a": normal(4, 2),
        SECOND + "lokr_w1_b": normal(2, 3),
        SECOND + "lokr_w2_a": normal(5, 2),
        SECOND + "lokr_w2_b": normal(2, 6),
    }


def test_the_delta(tmp_path: Path) -> None:
    written = tensors()
    save_file(written, tmp_path / "kron.safetensors")
    assert find_lycoris(tmp_path) == tmp_path / "kron.safetensors"
    read = unflatten(read_lycoris(tmp_path), NAMES)
    assert sorted(read) == sorted(NAMES[:2])
    second = (written[SECOND + f"{w}_a"] @ written[SECOND + f"{w}_b"] for w in ("lokr_w1", "lokr_w2"))
    for name, want in (
        (NAMES[0], torch.kron(written[FIRST + "lokr_w1"], written[FIRST + "lokr_w2"])),
        (NAMES[1], torch.kron(*second)),
    ):
        assert bool(want.any())
        torch.testing.assert_close(dense_delta(read[name]), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update({SECOND + "alpha": torch.tensor(1.0)}), "alpha is 1, the rank 2: LyCORIS's training"),
        (lambda t: t.pop(SECOND + "alpha"), "alpha is missing"),
        (lambda t: t.update({SECOND + "alpha": torch.ones(2)}), r"alpha is of shape \(2,\)"),
        (lambda t: t.update({FIRST + "dora_scale": torch.ones(1, 12)}), "weight-decomposed"),
        (lambda t: t.update({SECOND + "lokr_t2": torch.ones(2, 2, 3, 3)}), "convolution"),
        (lambda t: t.update({"lora_unet_down_blocks_0.lokr_w1": torch.ones(2, 2)}), "lora_unet_, lora_te_ are diffus"),
        (lambda t: t.pop(FIRST + "lokr_w2"), "expected lokr_w2, or lokr_w2_a and lokr_w2_b"),
        (lambda t: t.update({FIRST + "scalar": torch.ones(1)}), "unknown tensors scalar"),
        (lambda t: t[FIRST + "lokr_w1"].fill_(torch.nan), "values are not finite"),
    ],
)
def test_what_is_refused(tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], object], message: str) -> None:
    written = tensors()
    edit(written)
    save_file(written, tmp_path / "kron.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read_lycoris(tmp_path)


def test_other_directories_are_none_of_its(tmp_path: Path) -> None:
    assert find_lycoris(tmp_path / "nowhere") is None
    assert find_lycoris(tmp_path) is None
    save_file({"model.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    assert find_lycoris(tmp_path) is None
    save_file(tensors(), tmp_path / "a.safetensors")
    assert find_lycoris(tmp_path) is not None
    (tmp_path / "adapter_config.json").write_text("{}")
    assert find_lycoris(tmp_path) is None


def test_names_that_may_mean_two_modules(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "kron.safetensors")
    read = read_lycoris(tmp_path)
    with pytest.raises(
        ValueError, match=r"may mean model\.layers\.0\.self_attn\.q_proj or model\.layers\.0\.self\.attn"
    ):
        unflatten(read, [*NAMES, "model.layers.0.self.attn.q_proj"])
    assert "model_layers_0_mlp_down_proj" in unflatten(read, ["other"])


def test_modules_that_another_rank_names(tmp_path: Path) -> None:
    """Of those only how their names begin is known."""
    save_file(tensors(), tmp_path / "kron.safetensors")
    read = unflatten(read_lycoris(tmp_path), [], ["model.layers.0."])
    assert sorted(read) == ["model.layers.0.mlp_down_proj", "model.layers.0.self_attn_q_proj"]
