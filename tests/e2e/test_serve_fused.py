"""Adapters on Phi-3's fused projections in a real server: qkv_proj and gate_up_proj are one weight each in the file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Phi3Config

import soka_serve.peft  # noqa: F401 - registers SOKA
from soka_serve.adapter.format import write_adapter
from soka_serve.base.opened import Base
from soka_serve.builtin import base_directory
from tests.support.serve_adapters import TARGET_OPTIONS
from tests.support.serving import ONE_PROCESS, serve
from tests.support.tiny_models import random_factors

pytestmark = pytest.mark.slow

PROMPT = list(range(3, 40))


def write_phi3(folder: Path) -> Path:
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=626, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base_directory() / name, folder / name)
    return folder


def prompt_logprobs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, :-1].double()
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]


def test_fused_projections_are_served(tmp_path: Path) -> None:
    base = write_phi3(tmp_path / "base")
    factors = {
        module.name: random_factors(module.out_features, module.in_features, 2, seed=place)
        for place, module in enumerate(Base(base).layout.modules)
    }
    assert {name.rpartition(".")[2] for name in factors} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    write_adapter(tmp_path / "adapter", factors, base_model=str(base))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    plain = prompt_logprobs(model)
    adapted = prompt_logprobs(PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval())
    assert float((adapted - plain).abs().max()) > 0.1

    options = ["--model", str(base), *TARGET_OPTIONS]
    options += ["--lora-modules", f"adapter={tmp_path / 'adapter'}"]
    with serve(tmp_path, options, "float32", ONE_PROCESS) as server:
        for name, want in (("base", plain), ("adapter", adapted)):
            got = torch.tensor(server.ask_prompt(name, PROMPT), dtype=torch.float64)
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
