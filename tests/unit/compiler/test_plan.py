"""Plans: numbers checked by hand, bounds of ranks and parameters, and every shipped manifest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from soka_serve.base.base import Base
from soka_serve.base.modules import ModelSize, Module, modules_from_config, size_from_config
from soka_serve.compiler.methods import METHODS
from soka_serve.compiler.plan.estimate import TrainingSetup, estimate_memory
from soka_serve.compiler.plan.plan import make_plan
from soka_serve.compiler.plan.policies import policies_for
from soka_serve.compiler.plan.text import render_plan
from soka_serve.compiler.unread import unread_keys
from soka_serve.errors import PlanError
from soka_serve.manifest.read import read_manifest
from tests.support.plans import ATTENTION, CONFIGS, LLAMA2_7B, ROOT, llama2, load, tiny

# ------------------------------------------------------------------------------------------------- LLaMA-2-7B by hand


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Llama-2-7b-hf", 6_738_415_616),
        ("Llama-2-7b-chat-hf", 6_738_415_616),
        ("Llama-2-13b-hf", 13_015_864_320),
        ("Llama-2-70b-hf", 68_976_648_192),
        ("Llama-3.1-8B", 8_030_261_248),
        ("Llama-3.2-3B", 3_212_749_824),
    ],
)
def test_bundled_configs_have_the_published_sizes(name: str, parameters: int) -> None:
    directory = CONFIGS / f"meta-llama--{name}"
    config = json.loads((directory / "config.json").read_text())
    assert size_from_config(config, Base(directory).layout.modules).parameters == parameters


def test_llama2_attention_rank_1(tmp_path: Path) -> None:
    plan = llama2(tmp_path)
    assert {m.parameters_max for m in plan.modules} == {64 * 64 + 64 * 64 + 1}
    assert plan.parameters_min == plan.parameters_max == 4 * 32 * 8193 == 1_048_704
    rows = {c.name: c for c in plan.comparisons}
    assert rows["LoRA r=8"].parameters_max == 4 * 32 * 8 * (4096 + 4096) == 8_388_608
    assert rows["LoRA r=16"].parameters_max == rows["PiSSA r=16"].parameters_max == 16_777_216
    assert rows["full fine-tuning"].parameters_max == 6_738_415_616
    # Float32: the trained terms, and minus the initial ones where they are subtracted; PiSSA's delta is a LoRA of
    # twice the rank.
    assert plan.adapter_bytes == 4 * 1_048_704
    subtracted = llama2(tmp_path, f'[[adapt]]\ninit = "weights"\n{ATTENTION}')
    assert (subtracted.parameters_max, subtracted.adapter_bytes) == (plan.parameters_max, 2 * plan.adapter_bytes)
    assert rows["PiSSA r=8"].adapter_bytes == 2 * rows["LoRA r=8"].adapter_bytes
    assert rows["full fine-tuning"].adapter_bytes == 2 * 6_738_415_616


def test_llama2_every_projection(tmp_path: Path) -> None:
    plan = llama2(tmp_path, "")
    # 11008 x 4096 splits as (128 x 64) ⊗ (86 x 64): 8192 + 5504 + 1.
    assert {m.name.rsplit(".")[-1]: m.parameters_max for m in plan.modules} == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 8193),
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 13697),
    }
    assert plan.parameters_max == 32 * (4 * 8193 + 3 * 13697) == 2_363_616


def test_llama2_memory_by_hand(tmp_path: Path) -> None:
    train = 'batch_size = 1\nmax_length = 1000\nprecision = "bfloat16"'
    memory = llama2(tmp_path, train=train).memory
    assert memory.base == 2 * 6_738_415_616
    assert memory.trained == 16 * 1_048_704
    subtracted = llama2(tmp_path, f'[[adapt]]\ninit = "weights"\n{ATTENTION}', train=train).memory
    assert subtracted.trained == memory.trained + 4 * 1_048_704
    per_layer = 1000 * 2 * (6 * 4096 + 4 * 4096 + 4 * 11008)
    assert memory.activations == 32 * per_layer
    assert memory.logits == 1000 * 32000 * 10
    recomputed = llama2(tmp_path, train=train + "\ngradient_checkpointing = true").memory
    assert recomputed.activations == 32 * 1000 * 4096 * 2 + per_layer
    quantised = llama2(tmp_path, f'quantize = "4bit"\n[[adapt]]\n{ATTENTION}', train).memory
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert quantised.base == int(linear * 0.5625) + 2 * (6_738_415_616 - linear)
    full = llama2(tmp_path, train=train + '\nmethod = "full"')
    assert full.memory.base + full.memory.trained == 16 * 6_738_415_616
    assert full.parameters_max == 6_738_415_616


@pytest.mark.parametrize(("quantize", "computed"), [("none", "float32"), ("4bit", "bfloat16")])
def test_memory_of_what_auto_computes_in(tmp_path: Path, quantize: str, computed: str) -> None:
    """The embedded base is in float32; held in bits, it is computed with in bfloat16."""

    def logits(precision: str) -> int:
        file = tmp_path / f"{precision}.toml"
        base = f'[base]\nbuiltin = "tiny"\nquantize = "{quantize}"'
        file.write_text(f'schema = 1\n{base}\n[train]\nprecision = "{precision}"\n[train.data]\njsonl = "d.jsonl"\n')
        return make_plan(read_manifest(file)).memory.logits

    assert logits("auto") == logits(computed)
    assert logits("float32") > logits("bfloat16")


def test_policies_for_a_million_parameters() -> None:
    rows = policies_for(Base(LLAMA2_7B).layout.modules, 990_000)
    assert all(0 < row.parameters <= 990_000 for row in rows)
    found = {(row.projections, row.layers, row.rank): row.parameters for row in rows}
    assert found[("q_proj", "k_proj", "v_proj", "o_proj"), "-30-", 1] == 30 * 4 * 8193 == 983_160
    assert found[("q_proj", "v_proj"), "all", 1] == 2 * 32 * 8193
    assert found[("q_proj", "k_proj", "gate_proj"), "all", 1] == 32 * (2 * 8193 + 13697)
    assert rows[-1].policy == "budget"
    # Nothing on all layers comes closer than what is listed.
    best = max(row.parameters for row in rows if row.layers == "all" and row.rank)
    costs = {"a": 8193 * 32, "m": 13697 * 32}
    sums = {rank * (a * costs["a"] + m * costs["m"]) for rank in range(1, 5) for a in range(5) for m in range(4)}
    assert best == max(s for s in sums if s <= 990_000)


def test_listed_policies_plan_to_their_totals(tmp_path: Path) -> None:
    for row in policies_for(Base(LLAMA2_7B).layout.modules, 990_000):
        plan = llama2(tmp_path, row.toml)
        assert plan.parameters_max == row.parameters, row


def test_policies_below_one_term() -> None:
    with pytest.raises(PlanError, match="cheapest term"):
        policies_for(Base(LLAMA2_7B).layout.modules, 8192)


# ---------------------------------------------------------------------------------------------------- ranks, bounds


def test_rank_bounds(tmp_path: Path) -> None:
    rules = """
[[adapt]]
modules = ["q_proj"]
rank = { policy = "energy", min = 2, max = 5 }
[[adapt]]
modules = ["v_proj"]
rank = { policy = "budget", parameters = 500000, max = 10 }
[[adapt]]
modules = ["o_proj"]
shape = "auto"
init = "zero"
rank = { policy = "fixed", rank = 4 }
"""
    plan = llama2(tmp_path, rules)
    kinds = {m.name.rsplit(".")[-1]: m for m in plan.modules}
    q, v, o = kinds["q_proj"], kinds["v_proj"], kinds["o_proj"]
    assert (q.rank_min, q.rank_max, q.parameters_min, q.parameters_max) == (2, 5, 2 * 8193, 5 * 8193)
    assert (v.rank_min, v.rank_max) == (0, 10)
    assert (o.factor_shape, o.shape_rule, o.parameters_max) == (None, "auto", 4 * 8193)
    assert plan.parameters_max == 32 * 5 * 8193 + 500_000 + 32 * 4 * 8193
    # A budget is spent to within one term.
    assert plan.parameters_min == 32 * 2 * 8193 + (500_000 - 8193 + 1) + 32 * 2 * 8193
    text = render_plan(plan, color=False)
    assert "2-5 (energy)" in text
    assert "0-10 (budget)" in text


def test_budget_that_max_does_not_let_it_spend(tmp_path: Path) -> None:
    plan = llama2(tmp_path, '[[adapt]]\nrank = { policy = "budget", parameters = 99000000, max = 1 }')
    assert plan.parameters_min == plan.parameters_max == 2_363_616


def test_budget_too_small_for_its_minimum(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"adapt\[0\]\.rank: 224 modules with min = 1 need 2,363,616 parameters"):
        llama2(tmp_path, '[[adapt]]\nrank = { policy = "budget", parameters = 990000, min = 1 }')


def test_budget_that_buys_nothing(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="100 parameters does not buy one term; the cheapest has 193"):
        tiny(tmp_path, '[[adapt]]\nrank = { policy = "budget", parameters = 100 }')


@pytest.mark.parametrize("policy", ['{ policy = "fixed", rank = 4 }', '{ policy = "budget", parameters = 9000 }'])
def test_pruning_makes_ranks_a_maximum(tmp_path: Path, policy: str) -> None:
    rule = f"[[adapt]]\nrank = {policy}\n[train]"
    kept = tiny(tmp_path, rule)
    pruned = tiny(tmp_path, f"{rule}\nprune = {{ threshold = 0.1, min = 2 }}")
    assert [m.rank_min for m in pruned.modules] == [min(m.rank_min, 2) for m in kept.modules]
    assert pruned.parameters_max == kept.parameters_max
    assert pruned.parameters_min == sum(m.parameters_min for m in pruned.modules) < kept.parameters_min
    assert any("train.prune" in note for note in pruned.notes)


def test_what_training_leaves_alone_is_said(tmp_path: Path) -> None:
    assert any("left_lr and sigma_lr = 0" in n for n in tiny(tmp_path, "[train]\nleft_lr = 0\nsigma_lr = 0").notes)
    assert any("steps = 0: 28 modules" in n for n in tiny(tmp_path, "[train]\nsteps = 0").notes)
    assert not tiny(tmp_path).notes


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("lora", ["adapt[0].init", "adapt[0].rank", "output.adapter_dtype", "train.left_lr"]),
        ("full", ["adapt[0].modules", "adapt[0].init", "output.adapter_dtype", "train.method_rank", "train.left_lr"]),
        ("soka", ["train.method_rank"]),
    ],
)
def test_keys_that_the_method_does_not_read_are_said(tmp_path: Path, method: str, keys: list[str]) -> None:
    text = "[[adapt]]\nmodules = ['q_proj']\ninit = 'weights'\nrank = { policy = 'fixed', rank = 4 }\n"
    text += f"[train]\nmethod = '{method}'\nmethod_rank = 3\nleft_lr = 1.0\n[output]\nadapter_dtype = 'bfloat16'"
    (note,) = [note for note in tiny(tmp_path, text).notes if "does not read" in note]
    said = note.removeprefix(f"method = {method!r} does not read ").split(", ")
    assert set(keys) <= set(said)
    assert ("adapt[0].modules" in said) == (method == "full")
    assert ("train.method_rank" in said) == (method != "lora")


def test_what_measures_read_is_read_with_full_training_too(tmp_path: Path) -> None:
    """The spectra of gradients are those of the targets' weights."""
    text = "[base]\nbuiltin = 'tiny'\ndtype = 'bfloat16'\n[[adapt]]\nmodules = ['q_proj']\nlayers = [0]\n"
    notes = {}
    for measure in ("['intruders']", "['spectra']"):
        more = f"[output]\nmeasure = {measure}\n[train]\nmethod = 'full'\n[train.data]\nbuiltin = 'math'\nlimit = 9"
        notes[measure] = unread_keys(load(tmp_path, text + more).manifest)
    dtype = "base.dtype is not that of training: method = 'full' trains the model in float32"
    assert notes["['intruders']"] == ["method = 'full' does not read adapt[0].modules, adapt[0].layers", dtype]
    assert notes["['spectra']"] == [dtype]


def test_a_start_that_would_take_all_of_a_weight_off_is_refused(tmp_path: Path) -> None:
    text = "[[adapt]]\nmodules = ['q_proj']\ninit = 'truncated'\nrank = { policy = 'fixed', rank = %d }"
    assert tiny(tmp_path, text % 127).modules
    with pytest.raises(PlanError, match=r"adapt\[0\]\.rank: .* 128 terms off the weight; .* has 128: .*q_proj"):
        tiny(tmp_path, text % 128)


def test_rank_beyond_the_shape(tmp_path: Path) -> None:
    plan = llama2(
        tmp_path, '[[adapt]]\nmodules = ["q_proj"]\nshape = [2, 2, 2048, 2048]\nrank = { policy = "fixed", rank = 9 }'
    )
    assert {m.rank_max for m in plan.modules} == {4}
    assert any("32 modules ask for more terms" in note for note in plan.notes)


# -------------------------------------------------------------------------------------------------------- baselines


@pytest.mark.parametrize("method", ["lora", "pissa", "lokr"])
def test_baseline_parameters_are_peft_s(tmp_path: Path, method: str) -> None:
    import torch
    from peft import LoKrConfig, LoraConfig, get_peft_model

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = torch.nn.Linear(48, 30, bias=False)
            self.o_proj = torch.nn.Linear(31, 64, bias=False)

    for rank in (1, 2, 6):
        names = ["q_proj", "o_proj"]
        config = (
            LoKrConfig(r=rank, alpha=rank, target_modules=names)
            if method == "lokr"
            else LoraConfig(r=rank, target_modules=names)
        )
        model = get_peft_model(Layer(), config)  # type: ignore[arg-type]
        expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
        modules = [Module("q_proj", 30, 48, 0, "float32"), Module("o_proj", 64, 31, 0, "float32")]
        assert sum(METHODS[method].parameters(m, rank) for m in modules) == expected
    train = f'method = "{method}"\nmethod_rank = 2'
    plan = llama2(tmp_path, train=train)
    assert plan.method == method
    assert {(m.rank_max, m.init, m.factor_shape) for m in plan.modules} == {(2, method, None)}
    assert plan.comparisons[0].name == f"this manifest ({method})"


def test_qwen2_biases_and_tied_embeddings() -> None:
    config = {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
    }  # fmt: skip
    assert size_from_config(config, modules_from_config(config)).parameters == 494_032_768  # Qwen2-0.5B


# ------------------------------------------------------------------------------------------------ shipped manifests

MANIFESTS = sorted((ROOT / "manifests").rglob("*.toml"))


@pytest.mark.parametrize("path", MANIFESTS, ids=[str(p.relative_to(ROOT)) for p in MANIFESTS])
def test_every_shipped_manifest_plans(path: Path) -> None:
    plan = make_plan(read_manifest(path))
    assert plan.modules
    assert 0 < plan.parameters_min <= plan.parameters_max
    text = render_plan(plan, color=False)
    assert plan.name in text
    json.dumps(plan.to_json())


def test_default_plan_is_quick_and_without_torch() -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from soka_serve.manifest.read import read_manifest\n"
        "from soka_serve.compiler.plan.plan import make_plan\n"
        "from soka_serve.compiler.plan.text import render_plan\n"
        "render_plan(make_plan(read_manifest(Path(sys.argv[1]))))\n"
        "bad = {'torch', 'transformers', 'datasets', 'numpy', 'peft'} & set(sys.modules)\n"
        "assert not bad, bad\n"
        "assert time.process_time() < 2  # of the processor's, which other programs do not lengthen"
    )
    subprocess.run([sys.executable, "-c", code, str(ROOT / "manifests" / "math.toml")], check=True, cwd=ROOT)


def test_memory_without_modules_is_finite() -> None:
    size = ModelSize(100, 0, 400, "float32", 8, 10, 1)
    setting = TrainingSetup(
        size=size,
        modules=[],
        tokens=4,
        base_dtype="float32",
        quantize="none",
        precision="float32",
        gradient_checkpointing=False,
    )
    memory = estimate_memory(setting, trained=0)
    assert memory.total > memory.overhead
