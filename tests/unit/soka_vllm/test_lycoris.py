"""LoKr in LyCORIS's own files, and as PEFT writes it: what has one meaning is read, the rest is refused.

The tests against LyCORIS itself need it: `pip install lycoris-lora`.
What is refused of PEFT's files: tests/support/malformed.py, on a server.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoKrConfig, get_peft_model
from safetensors.torch import save_file

from soka_serve.adapter.lokr import look_at_lokr
from soka_serve.errors import CheckpointError
from soka_serve.io.budget import ReadingBudget
from soka_serve.kron import dense_delta
from soka_vllm.lycoris import find_lycoris, look_at_lycoris, unflatten

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
        SECOND + "alpha": torch.tensor(1.0),
        SECOND + "lokr_w1_a": normal(4, 2),
        SECOND + "lokr_w1_b": normal(2, 3),
        SECOND + "lokr_w2_a": normal(5, 2),
        SECOND + "lokr_w2_b": normal(2, 6),
    }


def test_the_delta(tmp_path: Path) -> None:
    written = tensors()
    save_file(written, tmp_path / "kron.safetensors")
    assert find_lycoris(tmp_path) == tmp_path / "kron.safetensors"
    read = unflatten(look_at_lycoris(tmp_path, ReadingBudget()).read(), NAMES)
    assert sorted(read) == sorted(NAMES[:2])
    second = (written[SECOND + f"{w}_a"] @ written[SECOND + f"{w}_b"] for w in ("lokr_w1", "lokr_w2"))
    for name, want in (
        (NAMES[0], torch.kron(written[FIRST + "lokr_w1"], written[FIRST + "lokr_w2"])),
        (NAMES[1], torch.kron(*second) / 2),  # alpha is 1, the rank 2
    ):
        assert bool(want.any())
        torch.testing.assert_close(dense_delta(read[name]), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update({SECOND + "alpha": torch.tensor(0.0)}), "alpha is 0, expected a finite number other"),
        (lambda t: t.update({SECOND + "alpha": torch.tensor(torch.nan)}), "alpha is nan, expected a finite number"),
        (lambda t: t.update({SECOND + "alpha": torch.tensor(1e300).double() * 1e300}), "alpha is inf, expected"),
        (lambda t: t.update({SECOND + "alpha": torch.tensor(1e300, dtype=torch.float64)}), "values are not finite"),
        (lambda t: t.update({FIRST + "alpha": torch.tensor(3**1.5)}), r"alpha 5\.19615 were trained with rs_lora"),
        (
            lambda t: t.update({FIRST + "alpha": torch.tensor(2**1.5).bfloat16()}),
            r"alpha 2\.82812 were trained with rs_",
        ),
        (
            lambda t: t.update({SECOND + "lokr_w1_a": torch.ones(4, 3), SECOND + "lokr_w1_b": torch.ones(3, 3)}),
            "lokr_w1 and lokr_w2 are products of different ranks, 2 and 3",
        ),
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
        look_at_lycoris(tmp_path, ReadingBudget()).read()


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
    read = look_at_lycoris(tmp_path, ReadingBudget()).read()
    with pytest.raises(
        ValueError, match=r"may mean model\.layers\.0\.self_attn\.q_proj or model\.layers\.0\.self\.attn"
    ):
        unflatten(read, [*NAMES, "model.layers.0.self.attn.q_proj"])
    assert "model_layers_0_mlp_down_proj" in unflatten(read, ["other"])


def test_modules_that_another_rank_names(tmp_path: Path) -> None:
    """Of those only how their names begin is known."""
    save_file(tensors(), tmp_path / "kron.safetensors")
    read = unflatten(look_at_lycoris(tmp_path, ReadingBudget()).read(), [], ["model.layers.0."])
    assert sorted(read) == ["model.layers.0.mlp_down_proj", "model.layers.0.self_attn_q_proj"]


LYCORIS = pytest.mark.skipif(find_spec("lycoris") is None, reason="LyCORIS is not installed: pip install lycoris-lora")
"""Loud: `pytest -rs` names it."""


def trained(tmp_path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[torch.nn.Module, Any]:
    """A model with layers of many forms, and LyCORIS's network on it, all values random, saved to `tmp_path`."""
    from lycoris import LycorisNetwork

    torch.manual_seed(0)
    model = torch.nn.Module()
    for name, (rows, columns) in {"wide": (96, 64), "tall": (64, 256), "square": (128, 128), "odd": (7, 64)}.items():
        model.add_module(name, torch.nn.Linear(columns, rows, bias=False))
    LycorisNetwork.apply_preset({"target_module": [], "target_name": [".+"]})
    network = LycorisNetwork(model, **{"lora_dim": 4, "alpha": 1, "network_module": "lokr", **options})
    network.apply_to()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    network.save_weights(str(tmp_path / "kron.safetensors"), dtype, {})
    return model, network


@LYCORIS
@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},  # LyCORIS's defaults: rank 4, alpha 1
        {"alpha": 6.0, "factor": 8, "decompose_both": True},
        {"rs_lora": True, "lora_dim": 3},
        {"lora_dim": 2, "decompose_both": True},
        {"lora_dim": 2, "decompose_both": True, "rs_lora": True, "use_scalar": True},
        {"lora_dim": 5, "unbalanced_factorization": True, "decompose_both": True},
        {"use_tucker": True, "use_scalar": True},  # no core in a linear layer
        {"full_matrix": True, "alpha": 3.0},
        {"lora_dim": 64},  # too large for products
    ],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_what_lycoris_computes(tmp_path: Path, options: dict[str, Any], bypass: bool) -> None:
    """The layers' outputs in training, rebuilt and in bypass mode, and what its loader makes of the file."""
    from lycoris import create_lycoris_from_weights

    model, network = trained(tmp_path, **options, bypass_mode=bypass)
    network.train()
    read = unflatten(look_at_lycoris(tmp_path, ReadingBudget()).read(), [name for name, _ in model.named_children()])
    assert len(read) == 4
    for name, layer in model.named_children():
        x = torch.randn(5, layer.in_features)
        want = (layer(x) - torch.nn.functional.linear(x, layer.weight)).detach()
        assert float(want.abs().max()) > 0.1
        got = x @ dense_delta(read[name]).t()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    if options.get("unbalanced_factorization"):
        return  # not in the file, and LyCORIS's loader would have to be told
    loaded, _ = create_lycoris_from_weights(1.0, str(tmp_path / "kron.safetensors"), model)
    for lora in loaded.loras:
        want = lora.get_weight(None).detach()
        torch.testing.assert_close(dense_delta(read[lora.lora_name.removeprefix("lycoris_")]), want)


@LYCORIS
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decompose": True}, "weight-decomposed"),
        ({"full_matrix": True, "rs_lora": True, "lora_dim": 6}, r"alpha 14\.6969 were trained with rs_lora"),
        ({"rs_lora": True, "lora_dim": 4}, r"lycoris_odd: two whole factors with alpha 8 were trained with rs_lora"),
    ],
)
def test_what_lycoris_trains_and_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    trained(tmp_path, **options)
    with pytest.raises(CheckpointError, match=message):
        look_at_lycoris(tmp_path, ReadingBudget()).read()


@LYCORIS
def test_half_precision(tmp_path: Path) -> None:
    """`save_weights` casts alpha too."""
    model, network = trained(tmp_path, torch.bfloat16, rs_lora=True, lora_dim=3)
    read = unflatten(look_at_lycoris(tmp_path, ReadingBudget()).read(), [name for name, _ in model.named_children()])
    for lora in network.loras:
        want = lora.get_weight(None).detach()
        delta = dense_delta(read[lora.lora_name.removeprefix("lycoris_")])
        torch.testing.assert_close(delta, want, rtol=0, atol=3e-2 * float(want.abs().max()))


# --- PEFT's: the delta is PEFT's own ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 2, "alpha": 3},
        {"r": 1, "alpha": 4, "decompose_both": True},
        {"r": 64, "alpha": 8, "decompose_factor": 2},
        {"r": 2, "alpha": 8, "rank_pattern": {"second": 1}, "alpha_pattern": {"first": 5}},
    ],
)
def test_delta_is_pefts(tmp_path: Path, settings: dict[str, object]) -> None:
    torch.manual_seed(0)
    config = LoKrConfig(target_modules=["first", "second"], init_weights=False, **settings)
    layers = {"first": torch.nn.Linear(24, 36, bias=False), "second": torch.nn.Linear(36, 10, bias=False)}
    model = get_peft_model(torch.nn.ModuleDict(layers), config)
    model.save_pretrained(tmp_path)
    factors = look_at_lokr(tmp_path, ReadingBudget()).read()
    assert sorted(factors) == ["first", "second"]
    for name, read in factors.items():
        want = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default").detach()
        assert bool(want.any())
        torch.testing.assert_close(dense_delta(read), want, rtol=1e-5, atol=1e-6)
