"""LoKr adapters that PEFT wrote, read as factors: the delta is PEFT's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoKrConfig, get_peft_model
from safetensors.torch import load_file, save_file

from soka_serve.adapter.format import CONFIG_FILE, WEIGHTS_FILE
from soka_serve.errors import CheckpointError
from soka_serve.kron import dense_delta
from soka_vllm.lokr import read_lokr


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(24, 36, bias=False)
        self.second = torch.nn.Linear(36, 10, bias=False)


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
    model = get_peft_model(Model(), config)
    model.save_pretrained(tmp_path)
    factors = read_lokr(tmp_path)
    assert sorted(factors) == ["first", "second"]
    for name, read in factors.items():
        want = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default").detach()
        assert bool(want.any())
        torch.testing.assert_close(dense_delta(read), want, rtol=1e-5, atol=1e-6)


def write(folder: Path, **settings: object) -> None:
    get_peft_model(Model(), LoKrConfig(target_modules=["first", "second"], r=2, **settings)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("base_model.model.first.lokr_w1"), "first: expected lokr_w1, or lokr_w1_a and lokr_w1_b"),
        (lambda t: t.update({"base_model.model.first.lokr_t2": torch.ones(2, 2)}), "unknown tensors lokr_t2"),
        (lambda t: t["base_model.model.second.lokr_w1"].fill_(torch.inf), "second: values are not finite"),
        (lambda t: t.update({"base_model.model.first.lokr_w1": torch.ones(4)}), r"of shape \(4,\) make no matrix"),
        (lambda t: t.update({"base_model.model.first.lokr_w1": torch.ones(2, 2).long()}), "is I64"),
        (
            lambda t: t.update(
                {
                    "base_model.model.second.lokr_w2_a": torch.ones(10**6, 1),
                    "base_model.model.second.lokr_w2_b": torch.ones(1, 10**6),
                }
            ),
            "make a matrix of 1000000 x 1000000, which is too large",
        ),
        (lambda t: t.clear(), "no tensors"),
    ],
)
def test_wrong_tensors(tmp_path: Path, edit, message: str) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    edit(tensors)
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=message):
        read_lokr(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("r", 0, "gives r as 0"),
        ("alpha", None, "gives alpha as None"),
        ("alpha", 10**400, "too large"),
        ("rank_pattern", ["first"], "rank_pattern must be an object"),
        ("rank_pattern", {"(": 2}, r"missing \)"),
        ("modules_to_save", ["second"], "whole"),
    ],
)
def test_wrong_settings(tmp_path: Path, key: str, value: object, message: str) -> None:
    write(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, key: value}))
    with pytest.raises(CheckpointError, match=message):
        read_lokr(tmp_path)


def test_a_truncated_file(tmp_path: Path) -> None:
    write(tmp_path)
    data = (tmp_path / WEIGHTS_FILE).read_bytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(data[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        read_lokr(tmp_path)
