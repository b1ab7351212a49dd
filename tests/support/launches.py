"""Adapters and command lines for the tests of `soka-serve serve` up to the start of vLLM."""

from __future__ import annotations

from pathlib import Path

import torch
from click.testing import CliRunner, Result
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from soka_serve.adapter.format import write_adapter
from soka_serve.base.checkpoint import Checkpoint
from soka_serve.builtin import base_directory
from soka_serve.cli import main
from soka_serve.kron import Factors
from soka_serve.serving import command as serving_command
from soka_serve.serving.command import parse_options

PROJECTION = "model.layers.0.self_attn.q_proj"


def run_serve(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["serve", *map(str, arguments)])


def refused(*arguments: str | Path) -> str:
    """What `serve` says when it refuses these arguments, without a try."""
    done = run_serve(*arguments, "--dry-run")
    assert done.exit_code == 2, done.output
    return done.output


def write_small_adapter(
    folder: Path, *, module: str = PROJECTION, base: str | None = None, sha256: str | None = None
) -> Path:
    generator = torch.Generator().manual_seed(0)
    rows, columns = Checkpoint.open(base_directory()).tensors[f"{PROJECTION}.weight"].shape
    left = torch.randn(1, rows // 8, columns // 8, generator=generator)
    factors = Factors(left, torch.randn(1, 8, 8, generator=generator), torch.ones(1))
    lock = None
    if sha256 is not None:
        lock = {"soka": 1, "name": folder.name, "base": {"name": "elsewhere", "sha256": sha256}}
    write_adapter(folder, {module: factors}, base_model=base or str(base_directory()), lock=lock)
    return folder


def write_lora(folder: Path, rank: int) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base_directory())
    adapted = get_peft_model(model, LoraConfig(r=rank, target_modules=["q_proj"]))
    adapted.save_pretrained(str(folder))
    return folder


def options_of(launch: serving_command.Launch) -> dict[str, list[str]]:
    return parse_options(launch.command[4:])
