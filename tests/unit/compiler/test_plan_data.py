"""Plans of data: what the model will see, how many steps it makes, and what cannot be reached."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from soka_serve.base.base import Base
from soka_serve.base.checkpoint import Checkpoint
from soka_serve.base.modules import modules_from_config, size_from_config
from soka_serve.builtin import base_directory
from soka_serve.compiler.plan.plan import StageStatus, make_plan
from soka_serve.compiler.plan.text import render_plan
from soka_serve.errors import DataError
from tests.support.plans import LLAMA2_7B, llama2, load, tiny

# --------------------------------------------------------------------------------------------------- the tiny base


def test_tiny_counts_come_from_its_headers(tmp_path: Path) -> None:
    plan = tiny(tmp_path)
    tensors = Checkpoint.open(base_directory()).tensors.values()
    assert plan.size.parameters == sum(t.numel for t in tensors)
    config = json.loads((base_directory() / "config.json").read_text())
    derived = size_from_config(config, modules_from_config(config))
    assert (derived.parameters, derived.linear) == (plan.size.parameters, plan.size.linear)
    assert plan.has_weights
    assert not plan.bundled_config


def test_examples_show_the_mask(tmp_path: Path) -> None:
    plan = tiny(tmp_path)
    assert len(plan.data.shown) == 3
    for example in plan.data.shown:
        masked, trained = example.segments
        assert (masked.trained, trained.trained) == (False, True)
        assert masked.text.startswith("<s>Question:")
        assert masked.text.endswith("Answer:")
        assert trained.text.endswith("</s>")
    text = render_plan(plan, color=False)
    assert f"⟦{plan.data.shown[0].segments[1].text}⟧".split("\n")[0] in text
    assert "\033" not in text
    painted = render_plan(plan, color=True)
    assert "\033[2m" in painted
    assert "\033[32m" in painted


def test_whole_text_loss_is_shown(tmp_path: Path) -> None:
    plan = tiny(tmp_path, "[train]\ncompletion_only = false")
    assert [s.trained for s in plan.data.shown[0].segments] == [True]


def test_data_counts_and_steps(tmp_path: Path) -> None:
    data = tiny(tmp_path, "[train]\nbatch_size = 8\naccumulate = 2\nepochs = 3").data
    assert (data.examples, data.sampled, data.exact, data.dropped, data.rows) == (50, 50, True, 0, 50)
    assert data.steps == 3 * 4  # 7 batches, two to a step
    assert tiny(tmp_path, "[train]\nsteps = 17").data.steps == 17
    packed = tiny(tmp_path, "[train]\npacking = true\nmax_length = 200").data
    assert packed.rows is not None
    assert packed.tokens is not None
    assert packed.tokens / 200 <= packed.rows < 50


@pytest.mark.parametrize(
    ("packing", "config", "noted"),
    [
        ("true", {"layer_types": ["conv", "full_attention"]}, True),
        ("true", {"text_config": {"linear_conv_kernel_dim": 4}}, True),
        ("true", {"layer_types": None}, False),
        ("false", {"layer_types": ["conv", "full_attention"]}, False),
    ],
)
def test_packing_on_layers_that_mix_examples_is_noted(
    tmp_path: Path, packing: str, config: dict[str, Any], noted: bool
) -> None:
    shutil.copytree(base_directory(), tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    text = f'[base]\npath = "base"\n[train]\npacking = {packing}\n[train.data]\nbuiltin = "math"\nlimit = 4'
    notes = make_plan(load(tmp_path, text)).notes
    assert any(note.startswith("train.packing: ") for note in notes) == noted


def test_large_data_is_sampled_and_says_so(tmp_path: Path) -> None:
    rows = [{"prompt": "a" * (1 + i % 2 * 40), "completion": "b"} for i in range(3000)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    plan = tiny(tmp_path, "[train]\nmax_length = 20", 'jsonl = "d.jsonl"')
    assert (plan.data.examples, plan.data.sampled, plan.data.exact) == (3000, 1000, False)
    assert plan.data.dropped == 500
    assert plan.data.rows == 1500
    text = render_plan(plan, color=False)
    assert "of the first 1,000" in text
    assert "500 dropped as too long" in text
    assert "about 1,500 rows" in text


def test_held_out_examples_are_not_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}] * 10
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert tiny(tmp_path, "", 'jsonl = "d.jsonl"\neval_frac = 0.2').data.examples == 8


def test_gsm8k(tmp_path: Path, shared_data: Path) -> None:
    data = f"""jsonl = "{shared_data / "gsm8k_train.jsonl"}"
prompt = "Question: {{{{ question }}}}\\nAnswer:"
completion = " {{{{ answer }}}}"
"""
    plan = tiny(tmp_path, "[train]\nmax_length = 300", data)
    assert plan.data.examples == 7473
    assert "#### 72" in plan.data.shown[0].segments[1].text or plan.data.dropped


def test_stages_and_policies_are_shown(tmp_path: Path) -> None:
    stages = [
        StageStatus("init", "abcdef0123456789", True),
        StageStatus("tune", "1234", False, "learning_rate changed"),
    ]
    plan = tiny(tmp_path, policies=40_000).with_stages(stages)
    text = render_plan(plan, color=False)
    assert "abcdef012345" in text
    assert "learning_rate changed" in text
    assert "Rules near the budget" in text
    assert "Stages" not in render_plan(tiny(tmp_path), color=False)


def test_identical_layers_are_one_line(tmp_path: Path) -> None:
    text = render_plan(llama2(tmp_path), color=False)
    assert "model.layers.0-31.self_attn.q_proj ×32" in text
    assert "262,176 (8,193 each)" in text
    rule = '[[adapt]]\nmodules = ["q_proj"]\nlayers = [0, 1, 2, 5, 7, 8]'
    assert "model.layers.0-2,5,7-8.self_attn.q_proj ×6" in render_plan(llama2(tmp_path, rule), color=False)
    every = render_plan(llama2(tmp_path), every=True, color=False)
    assert "model.layers.17.self_attn.q_proj" in every
    assert "×" not in every


def test_json_round_trip(tmp_path: Path) -> None:
    plan = tiny(tmp_path).with_stages([StageStatus("init", "k", False)])
    value = json.loads(json.dumps(plan.to_json()))
    assert value["parameters_max"] == plan.parameters_max
    assert len(value["modules"]) == len(plan.modules)
    assert value["comparisons"][0]["memory"]["total"] == plan.memory.total
    assert value["stages"][0]["name"] == "init"
    assert value["data"]["exact"] is True


# ------------------------------------------------------------------------------------------- what cannot be reached


def test_without_the_hub_the_bundled_config_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = '[base]\nhub = "meta-llama/Llama-2-7b-hf"\n[train.data]\nhub = "meta-math/MetaMathQA"'
    plan = make_plan(load(tmp_path, text))
    assert plan.bundled_config
    assert plan.size.parameters == 6_738_415_616
    assert plan.data.shown == ()
    assert plan.data.problem is not None
    assert "tokens cannot be counted" in plan.data.problem
    assert "examples cannot be shown: hub dataset 'meta-math/MetaMathQA'" in plan.data.problem
    assert "config inside the package" in render_plan(plan, color=False)
    assert any(record.levelname == "WARNING" for record in caplog.records)


def test_without_a_tokenizer_examples_are_text(tmp_path: Path) -> None:
    plan = llama2(tmp_path)
    assert plan.data.shown[0].tokens is None
    assert plan.data.shown[0].segments[0].text.startswith("Question:")
    assert plan.data.steps is None


def test_chats_without_a_tokenizer(tmp_path: Path) -> None:
    text = '[base]\nhub = "meta-llama/Llama-2-7b-hf"\n[train.data]\njsonl = "x.jsonl"\nmessages = "m"'
    plan = make_plan(load(tmp_path, text), base=Base(LLAMA2_7B))
    assert "chat template" in str(plan.data.problem)


@pytest.mark.parametrize(
    ("content", "message"), [('{"q": 1}\n', "names column 'prompt'"), ("{\n", "malformed JSON"), ("", "empty")]
)
def test_data_that_is_there_but_wrong_stops_a_plan(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        tiny(tmp_path, "", 'jsonl = "d.jsonl"')


def test_everything_too_long_stops_a_plan(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="longer than max_length = 3"):
        tiny(tmp_path, "[train]\nmax_length = 3")
