"""The experiments for PEFT's method comparison: what their README says of them holds, and they train."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import soka_serve.peft
from soka_serve.peft import SokaConfig
from tests.support.peft_models import VOCABULARY, logits, steps, tokens

FOLDER = Path(__file__).resolve().parents[3] / "eval" / "peft_method_comparison"
EXPERIMENTS = FOLDER / "experiments" / "soka"
NAMES = sorted(path.name for path in EXPERIMENTS.iterdir())
ROW = re.compile(r"^\| `(llama-[^`]+)` \| (.+) \| (\d+) \| `(\w+)` \| ([\d,]+) \|$", re.MULTILINE)
STATED = {
    name: (set(re.findall(r"`(\w+)`", modules)), int(terms), start, int(count.replace(",", "")))
    for name, modules, terms, start, count in ROW.findall((FOLDER / "README.md").read_text())
}
LLAMA_3_2_3B = {
    "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
    "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
}  # fmt: skip
# The same proportions: 3 query heads for one of keys and values, MLP of 8/3 of the hidden size.
TINY = {
    **LLAMA_3_2_3B, "vocab_size": VOCABULARY, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def read(name: str) -> SokaConfig:
    config = peft.PeftConfig.from_pretrained(str(EXPERIMENTS / name))
    assert isinstance(config, SokaConfig)
    return config


def test_the_readme_lists_every_experiment() -> None:
    assert sorted(STATED) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_says_what_the_config_says_and_its_parameter_count(name: str) -> None:
    modules, terms, start, count = STATED[name]
    config = read(name)
    assert (config.target_modules, config.r, config.init_soka_weights) == (modules, terms, start)
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(**LLAMA_3_2_3B))
    # On the meta device there is no weight to decompose; where the factors start does not change their number.
    config.init_soka_weights, config.soka_initial = "zero", False
    model = peft.get_peft_model(base, config)
    layers = soka_serve.peft.soka_layers(model)
    found = [layer.module_name.rpartition(".")[2] for layer in layers.values()]
    assert {module: found.count(module) for module in found} == dict.fromkeys(modules, 28)
    assert model.get_nb_trainable_parameters()[0] == count


@pytest.mark.parametrize("name", NAMES)
def test_the_training_parameters_leave_out_weight_decay(name: str) -> None:
    # Stated, not left out: these keyword arguments replace the benchmark's as a whole, and AdamW's own default is 0.01.
    parameters = json.loads((EXPERIMENTS / name / "training_params.json").read_text())
    assert set(parameters) == {"optimizer_kwargs"}
    assert parameters["optimizer_kwargs"]["weight_decay"] == 0
    assert 0 < parameters["optimizer_kwargs"]["lr"] < 1


@pytest.mark.parametrize("name", NAMES)
def test_a_small_llama_of_the_same_proportions_trains_and_reloads(name: str, tmp_path: Path) -> None:
    def base() -> LlamaForCausalLM:
        torch.manual_seed(0)
        model: LlamaForCausalLM = LlamaForCausalLM(LlamaConfig(**TINY)).to(torch.bfloat16).eval()
        return model

    ids = tokens()
    model = peft.get_peft_model(base(), read(name))
    before = logits(model, ids)
    assert torch.equal(before, logits(base(), ids))

    options = json.loads((EXPERIMENTS / name / "training_params.json").read_text())["optimizer_kwargs"]
    losses = steps(model, torch.optim.AdamW(model.parameters(), **options), [ids] * 3)
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    after = logits(model, ids)
    assert not torch.equal(after, before)

    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base(), tmp_path).eval(), ids), after)


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(FOLDER / "run_with_soka.py"), *arguments], cwd=folder, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_launcher_runs_run_py_with_soka_among_the_methods(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("from peft import PeftConfig\n")
    (tmp_path / "run.py").write_text(
        "import sys\n"
        "from neighbour import PeftConfig\n"
        "if __name__ == '__main__':\n"
        "    print(type(PeftConfig.from_pretrained(sys.argv[1])).__name__)\n"
    )
    result = launch(tmp_path, str(EXPERIMENTS / NAMES[0]))
    assert (result.returncode, result.stdout) == (0, "SokaConfig\n"), result.stderr


def test_the_launcher_says_where_to_start_it(tmp_path: Path) -> None:
    result = launch(tmp_path)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("no run.py here")
