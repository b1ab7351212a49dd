"""The modules of a base are those of the model that transformers loads, whatever its files are called and hold."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file

import soka_serve
from soka_serve.base.base import Base
from soka_serve.builtin import base_directory
from soka_serve.errors import CheckpointError, PlanError

SMALL: dict[str, Any] = {
    "vocab_size": 626, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LLAMA = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
DEEPSEEK: dict[str, Any] = {
    "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8,
    "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip

Case = tuple[Callable[[], Any], tuple[str, ...], tuple[str, ...]]
# The config, the projections that are adapted, and what is named as left out.
CASES: dict[str, Case] = {
    "llama": (lambda: T.LlamaConfig(**SMALL), LLAMA, ()),
    "qwen2": (lambda: T.Qwen2Config(**SMALL), LLAMA, ()),
    "qwen3": (lambda: T.Qwen3Config(**SMALL, head_dim=16), LLAMA, ()),
    "mistral": (lambda: T.MistralConfig(**SMALL), LLAMA, ()),
    "granite": (lambda: T.GraniteConfig(**SMALL), LLAMA, ()),
    "gemma3_text": (lambda: T.Gemma3TextConfig(**SMALL, head_dim=16), LLAMA, ()),
    "phi3": (lambda: T.Phi3Config(**SMALL), ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), ()),
    "lfm2": (
        lambda: T.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
        ("in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "w1", "w2", "w3"),
        ("layers.*.conv.conv (a Conv1d",),
    ),
    "gpt_oss": (
        lambda: T.GptOssConfig(**SMALL, head_dim=8, num_local_experts=4),
        ATTENTION,
        ("layers.*.mlp.router (a router)", "layers.*.mlp.experts (experts"),
    ),
    "qwen2_moe": (
        lambda: T.Qwen2MoeConfig(
            **SMALL, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4
        ),
        LLAMA,
        ("layers.*.mlp.gate, model.layers.*.mlp.shared_expert_gate (a router)", "layers.*.mlp.experts"),
    ),
    "deepseek_v3": (
        lambda: T.DeepseekV3Config(**{**SMALL, **DEEPSEEK}),
        ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        ("layers.*.mlp.experts", "layers.*.mlp.gate (a router)"),
    ),
    "gemma3": (
        lambda: T.Gemma3Config(
            text_config={**SMALL, "head_dim": 16},
            vision_config={**VISION, "image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
        ),
        LLAMA,
        ("vision_tower",),
    ),
    "bamba": (
        lambda: T.BambaConfig(**SMALL, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1),
        (*LLAMA, "in_proj"),
        ("mamba.out_proj (Mamba's fused kernels", "mamba.conv1d"),
    ),
    "gpt_neox": (
        lambda: T.GPTNeoXConfig(
            vocab_size=626, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
        ),
        ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
        (),
    ),
}  # fmt: skip


def write(directory: Path, config: Any) -> Any:
    """A random model of a config, with the embedded model's tokenizer."""
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base_directory() / name, directory / name)
    return model


def write_manifest(directory: Path, base: str, text: str = "", train: str = "") -> Path:
    path = directory / "m.toml"
    path.write_text(
        f'schema = 1\n[base]\npath = "{base}"\n{text}\n[output]\nwrite = ["adapter", "merged"]\n'
        f"[train]\nsteps = 3\nlearning_rate = 0.05\nbatch_size = 2\n{train}\n"
        'data = { builtin = "math", limit = 4 }\n[eval]\nlimit = 0\n'
    )
    return path


def rename(file: Path, change: Callable[[str], str]) -> None:
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", CASES)
def test_plan_and_model_have_the_same_modules(tmp_path: Path, kind: str) -> None:
    """Plan's modules are linear layers of the model, their weights are found, and nothing goes without a word."""
    make, projections, left_out = CASES[kind]
    model = write(tmp_path / "base", make())
    plan = soka_serve.plan(write_manifest(tmp_path, "base", '[[adapt]]\ninit = "zero"'))

    assert {module.name.rpartition(".")[2] for module in plan.modules} == set(projections)
    for module in plan.modules:
        layer = model.get_submodule(module.name)
        assert type(layer) is torch.nn.Linear
        assert (layer.out_features, layer.in_features) == (module.out_features, module.in_features)
    assert plan.size.parameters == model.num_parameters()
    for text in left_out:
        assert any(text in entry for entry in plan.not_adapted), (text, plan.not_adapted)
    assert len(plan.not_adapted) >= len(left_out) > 0 or plan.not_adapted == ()
    if not left_out:  # then all of them
        assert len(plan.modules) == sum(type(layer) is torch.nn.Linear for layer in model.get_decoder().modules())
    base = Base(tmp_path / "base").layout
    assert base.unused == ()
    for module in base.modules:
        assert torch.equal(base.weights.read(module.name), model.get_submodule(module.name).weight)


def build(directory: Path, text: str = "", train: str = "") -> tuple[Path, Path]:
    """The adapter and the merged model."""
    manifest = write_manifest(directory, "base", text, train)
    result = soka_serve.build(manifest, out=directory / "build", progress=False)
    assert result.adapter is not None
    assert result.merged is not None
    return result.adapter, result.merged


def deltas(adapter: Path) -> dict[str, torch.Tensor]:
    from soka_serve.adapter.format import read_adapter
    from soka_serve.kron import dense_delta

    read = read_adapter(adapter)
    return {name: dense_delta(read.delta_factors(name)) for name in read.factors}


QUICK = '[[adapt]]\nmodules = ["q_proj", "down_proj"]\nscale = 3.0\ncalibration_batches = 0'


@pytest.mark.slow
def test_layers_that_the_model_leaves_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Layers for multi-token prediction are in the checkpoint and not in the model: named, and left as they are."""
    base = tmp_path / "base"
    shutil.copytree(base_directory(), base)
    whole = soka_serve.plan(write_manifest(tmp_path, "base"))
    tensors = load_file(base / "model.safetensors")
    query = tensors["model.layers.0.self_attn.q_proj.weight"] + 1
    extra = {f"{layer}.self_attn.q_proj.weight": query.clone() for layer in ("mtp.layers.0", "model.layers.4")}
    save_file({**tensors, **extra}, base / "model.safetensors", metadata={"format": "pt"})

    plan = soka_serve.plan(tmp_path / "m.toml")
    assert plan.modules == whole.modules
    assert plan.size == whole.size
    assert any("2 tensors of 2 modules that the model does not use, such as m" in note for note in plan.notes)
    with caplog.at_level(logging.WARNING):
        adapter, made = build(tmp_path, '[[adapt]]\nlayers = "-2-"\nmodules = ["q_proj"]')
    assert sum("2 tensors of 2 modules that the model does not use" in r.getMessage() for r in caplog.records) == 1
    assert sorted(deltas(adapter)) == [f"model.layers.{layer}.self_attn.q_proj" for layer in (2, 3)]
    merged = load_file(made / "model.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in extra.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_bare_model(tmp_path: Path, kind: str) -> None:
    """Tensors without 'model.' in front, as the bare model is saved: adapters name the model's modules all the same."""
    config = CASES[kind][0]()
    config.tie_word_embeddings = True
    write(tmp_path / "base", config)
    rename(tmp_path / "base" / "model.safetensors", lambda name: name.removeprefix("model."))
    plan = soka_serve.plan(write_manifest(tmp_path, "base", QUICK))
    adapter, merged = build(tmp_path, QUICK)

    found = deltas(adapter)
    assert sorted(found) == sorted(module.name for module in plan.modules)
    assert all(name.startswith("model.layers.") for name in found)
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(merged / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        module = f"model.{name}".removesuffix(".weight")
        want = tensor + found[module] if module in found else tensor
        torch.testing.assert_close(after[name], want)
    assert_same_logits(tmp_path / "base", adapter, merged)


def assert_same_logits(base: Path, adapter: Path, merged: Path) -> None:
    from peft import PeftModel

    import soka_serve.peft  # noqa: F401 - registers SOKA

    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        plain = T.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        alone = plain(ids).logits
        adapted = PeftModel.from_pretrained(plain, str(adapter)).eval()(ids).logits
        dense = T.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()(ids).logits
    torch.testing.assert_close(dense, adapted, atol=1e-4, rtol=1e-4)
    assert float((adapted - alone).abs().max()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["soka", "lora"])
def test_a_multimodal_base(tmp_path: Path, method: str) -> None:
    """The language model is adapted; its tensors have other names in the file, and each keeps its dtype in a merge."""
    write(tmp_path / "base", CASES["gemma3"][0]())
    file = tmp_path / "base" / "model.safetensors"
    kept = "language_model.model.layers.0.self_attn.q_proj.weight"
    tensors = load_file(file)
    assert kept in tensors
    save_file(
        {name: tensor if name == kept else tensor.bfloat16() for name, tensor in tensors.items()},
        file,
        metadata={"format": "pt"},
    )
    adapter, made = build(tmp_path, QUICK if method == "soka" else "", f'method = "{method}"')
    if method == "soka":
        assert all(name.startswith("model.language_model.layers.") for name in deltas(adapter))
    merged = load_file(made / "model.safetensors")
    assert merged.keys() == tensors.keys()
    assert {name for name, tensor in merged.items() if tensor.dtype == torch.float32} == {kept}
    assert not torch.equal(merged[kept], tensors[kept])


def test_a_base_without_a_causal_language_model(tmp_path: Path) -> None:
    vision = {**VISION, "model_type": "clip_vision_model"}
    config = T.LlavaConfig(text_config=T.LlamaConfig(**SMALL), vision_config=vision)
    T.LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base_directory() / name, tmp_path / "base" / name)
    manifest = write_manifest(tmp_path, "base")
    for refuse in (soka_serve.plan, soka_serve.build):
        with pytest.raises(CheckpointError, match="no causal language model for model_type 'llava'"):
            refuse(manifest)


@pytest.mark.parametrize("kind", ["granite", "llama"])
def test_a_value_of_a_wrong_type_in_the_config(tmp_path: Path, kind: str) -> None:
    """Both of the plan's ways, and what loads the model."""
    from soka_serve.base.model import load_base

    write(tmp_path / "base", CASES[kind][0]())
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": None}))
    for read in (load_base, lambda directory: Base(directory).layout):
        with pytest.raises(CheckpointError, match=r"config\.json: .*num_hidden_layers"):
            read(tmp_path / "base")


def test_conv1d_is_named(tmp_path: Path) -> None:
    write(tmp_path / "base", T.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=626))
    with pytest.raises(
        CheckpointError, match=r"no linear projection .*\n  not transformer\.h\.\*\.attn\.c_attn.*Conv1D"
    ):
        soka_serve.plan(write_manifest(tmp_path, "base"))


def test_a_rule_for_what_cannot_be_adapted_says_why(tmp_path: Path) -> None:
    write(tmp_path / "base", CASES["qwen2_moe"][0]())
    for pattern, reason in (("*.mlp.gate", "a router"), ("experts", "fused kernels"), ("shared_expert_gate", "router")):
        with pytest.raises(PlanError, match=f"cannot be adapted.*{reason}"):
            soka_serve.plan(write_manifest(tmp_path, "base", f'[[adapt]]\nmodules = ["{pattern}"]'))


def test_what_no_rule_adapts_is_shown(tmp_path: Path) -> None:
    from soka_serve.compiler.plan.text import render_plan

    shutil.copytree(base_directory(), tmp_path / "base")
    plan = soka_serve.plan(write_manifest(tmp_path, "base", '[[adapt]]\nmodules = ["q_proj", "v_proj"]'))
    (line,) = plan.not_adapted
    assert line.startswith("model.layers.*.self_attn.k_proj, model.layers.*.self_attn.o_proj, ")
    assert line.endswith("(no rule adapts them)")
    assert f"  not adapted: {line}\n" in render_plan(plan, color=False)


def test_a_weight_that_is_a_part_of_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that transformers cuts out of another tensor cannot be merged back: left out with the reason."""
    from transformers.core_model_loading import Chunk, WeightConverter

    from soka_serve.base import meta_model

    write(tmp_path, CASES["granite"][0]())
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for layer in range(2):
        up, gate = (f"model.layers.{layer}.mlp.{name}_proj.weight" for name in ("up", "gate"))
        tensors[f"model.layers.{layer}.mlp.both.weight"] = torch.cat([tensors.pop(up), tensors.pop(gate)])
    save_file(tensors, file, metadata={"format": "pt"})
    cutting = WeightConverter(["mlp.both.weight"], ["mlp.up_proj.weight", "mlp.gate_proj.weight"], [Chunk(dim=0)])
    monkeypatch.setattr(meta_model, "get_model_conversion_mapping", lambda model: [cutting])

    base = Base(tmp_path).layout
    assert {m.projection for m in base.modules} == {*ATTENTION, "down_proj"}
    (entry,) = base.left_out
    assert (
        "mlp.gate_proj, model.layers.*.mlp.up_proj (transformers makes the weight from other tensors" in entry.to_text()
    )
    assert base.unused == ()
    with pytest.raises(
        CheckpointError, match=r"up_proj: its weight is no tensor .* from 1 \(model.layers.0.mlp.both.weight"
    ):
        base.weights.get("model.layers.0.mlp.up_proj")


def test_a_checkpoint_that_lacks_a_projection(tmp_path: Path) -> None:
    write(tmp_path / "base", CASES["phi3"][0]())
    rename(
        tmp_path / "base" / "model.safetensors", lambda name: name.replace("1.self_attn.qkv_proj", "1.self_attn.qkv")
    )
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.qkv_proj\.weight is missing"):
        soka_serve.plan(write_manifest(tmp_path, "base"))


def test_a_plan_says_what_cannot_be_served(tmp_path: Path) -> None:
    for kind, mentioned in (("phi3", False), ("lfm2", True)):
        write(tmp_path / kind, CASES[kind][0]())
        plan = soka_serve.plan(write_manifest(tmp_path, kind))
        assert any("does not serve adapters on them" in note for note in plan.notes) is mentioned
