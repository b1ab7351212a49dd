"""A build that starts from what a 4-bit base loses: trained, stored, merged, resumed from and measured on its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import soka_serve
import soka_serve.peft
from soka_serve.adapter.format import read_adapter
from soka_serve.base.held import held_modules, held_weight
from soka_serve.base.model import load_base
from soka_serve.builtin import base_directory
from soka_serve.compiler.build import BuildResult
from soka_serve.io.lockfile import read_lock
from tests.support.builds import run_cli, write_manifest

pytest.importorskip("bitsandbytes", reason="k-bit bases need bitsandbytes (pip install -e '.[kbit]')")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    folder = tmp_path_factory.mktemp("quantised")
    base, start = ("\n[[adapt]]", 'quantize = "4bit"\n\n[[adapt]]'), 'init = "quantisation"\ncalibration_batches = 0'
    manifest = write_manifest(folder, steps=0, replace=base, start=start, output='measure = ["intruders"]')
    return soka_serve.build(manifest, out=folder / "build", progress=False)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(200, (2, 16), generator=torch.Generator().manual_seed(0))
    found: torch.Tensor = torch.log_softmax(model(input_ids=ids).logits.double(), -1)
    return found


def test_the_untrained_adapter_brings_the_base_nearer_to_the_full_one(built: BuildResult) -> None:
    full, held = load_base(base_directory(), "float32"), load_base(base_directory(), "float32", "4bit")
    wanted, before = logits(full), logits(held)
    after = logits(PeftModel.from_pretrained(held, str(built.adapter)))
    assert 0 < (after - wanted).square().mean() < 0.97 * (before - wanted).square().mean()
    # The merged model is that one, on plain weights, and not the full base with the terms on top of it.
    merged = logits(load_base(Path(str(built.merged)), "float32"))
    torch.testing.assert_close(merged, after, rtol=0, atol=1e-3)
    assert (merged - wanted).abs().max() > 0.01
    lock = read_lock(Path(str(built.merged)) / "soka.lock")
    assert lock["quantize"] == read_adapter(str(built.adapter)).quantize == "4bit"
    card = (Path(str(built.adapter)) / "README.md").read_text()
    assert "BitsAndBytesConfig(load_in_4bit=True" in card
    assert "vllm serve" not in card
    other = load_base(Path(str(built.merged)), "float32")
    name = next(n for n in sorted(held_modules(base_directory(), "4bit")) if n.endswith("up_proj"))
    weight = full.get_submodule(name).weight.detach()
    assert torch.equal(other.get_submodule(name).weight.detach(), held_weight(weight, "4bit")), "of no adapter, too"


def test_eval_holds_the_base_in_its_bits(built: BuildResult) -> None:
    folder = built.directory.parent.parent
    build = (folder / "small.toml", "--out", folder / "build")
    done = run_cli("eval", *build, "--backend", "transformers", "--limit", "2", cwd=folder)
    assert done.returncode == 0, done.stderr
