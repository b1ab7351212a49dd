"""Packed examples on models of many kinds: kept apart, given masks, or refused with the layer's name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from soka_serve.compiler.train.packing import check_packing
from soka_serve.data.collate import PadCollator
from soka_serve.data.encode import EncodedExample, PackedRow, pack_examples
from soka_serve.errors import PlanError
from tests.support.training import VOCABULARY, make_base, run_training

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LINEAR: dict[str, Any] = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
_APART: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_SIZES, head_dim=16, sliding_window=8)),
    "qwen2-moe": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(**_SIZES, **_EXPERTS, shared_expert_intermediate_size=32)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2)),
}
_MIXING: dict[str, tuple[str, Callable[[], Any]]] = {
    "qwen3.5": (
        r"model\.layers\.0\.linear_attn \(Qwen3_5GatedDeltaNet, linear_attention\)",
        lambda: hf.Qwen3_5ForCausalLM(hf.Qwen3_5TextConfig(**_SIZES, **_LINEAR)),
    ),
    "qwen3-next": (
        r"model\.layers\.0\.linear_attn \(Qwen3NextGatedDeltaNet, linear_attention\)",
        lambda: hf.Qwen3NextForCausalLM(
            hf.Qwen3NextConfig(**_SIZES, **_LINEAR, **_EXPERTS, shared_expert_intermediate_size=32)
        ),
    ),
    "lfm2": (
        r"model\.layers\.0\.conv \(Lfm2ShortConv, conv\)",
        lambda: hf.Lfm2ForCausalLM(hf.Lfm2Config(**_SIZES, layer_types=["conv", "full_attention"])),
    ),
    "granite hybrid": (
        r"model\.layers\.0\.mamba \(GraniteMoeHybridMambaLayer",
        lambda: hf.GraniteMoeHybridForCausalLM(
            hf.GraniteMoeHybridConfig(
                **_SIZES, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=32,
                layer_types=["mamba", "attention"], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8,
                mamba_n_groups=1,
            )
        ),
    ),
    "bloom": (
        r"transformer\.h\.0\.self_attention \(BloomAttention\)",
        lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2)),
    ),
}  # fmt: skip


def make_gpt_oss() -> Any:
    """It makes its masks without looking at positions; windows shorter than the examples."""
    return hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **_SIZES, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        )
    )  # fmt: skip


def ready(make: Callable[[], Any], dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    model.config.use_cache = False
    return model


def examples() -> list[EncodedExample]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (20, 30, 13)]
    return [EncodedExample(tokens, tokens) for tokens in ids]


def check(model: Any, rows: list[PackedRow] | None = None, *, together: bool = True) -> None:
    @torch.no_grad()
    def forward(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        logits: torch.Tensor = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        return logits

    half = next(model.parameters()).element_size() < 4
    check_packing(
        model, rows or pack_examples(examples(), 64), PadCollator(0, 8), forward, half=half, together=together
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", _APART)
def test_models_that_keep_examples_apart(name: str, dtype: torch.dtype) -> None:
    model = ready(_APART[name], dtype)
    check(model)
    check(model, together=False)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", _MIXING)
def test_models_that_mix_examples_are_refused(name: str, dtype: torch.dtype) -> None:
    layer, make = _MIXING[name]
    model = ready(make, dtype)
    with pytest.raises(PlanError, match=rf"train\.packing: layers such as {layer}.*nats") as caught:
        check(model, together=dtype == torch.float32)
    assert caught.value.hint == "set train.packing = false"
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpt_oss_is_given_masks(dtype: torch.dtype) -> None:
    """Afterwards each example's logits are those of the example alone, and so are the gradients, recomputed or not."""
    model = ready(make_gpt_oss, dtype)
    batch = PadCollator(0)(pack_examples(examples(), 64))

    def worst() -> float:
        with torch.no_grad():
            row = model(**batch).logits[0]
            alone = [model(input_ids=torch.tensor([e.input_ids])).logits[0] for e in examples()]
        ends = list(itertools.accumulate((len(e.input_ids) for e in examples()), initial=0))
        spans = itertools.pairwise(ends)
        return max(float((row[a:b] - one).abs().max()) for (a, b), one in zip(spans, alone, strict=True))

    assert worst() > 1e-2
    check(model)
    assert worst() < (1e-5 if dtype == torch.float32 else 1e-2)
    padded = PadCollator(0)(examples())
    weight = model.model.layers[0].self_attn.q_proj.weight
    gradients = []
    for inputs, checkpointing in ((batch, False), (batch, True), (padded, False)):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train(checkpointing)
        model(**inputs).loss.backward()
        gradients.append(weight.grad.clone())
        weight.grad = None
    for gradient in gradients[:2]:
        torch.testing.assert_close(gradient, gradients[2], rtol=1e-4, atol=1e-2 * float(gradients[2].abs().max()))


def test_positions_that_do_not_start_again() -> None:
    """Nothing leaks, but the second example is not where it is when it is alone."""
    model = ready(_APART["gpt2"])
    torch.nn.init.normal_(model.transformer.wpe.weight)
    model.transformer.wpe.register_forward_pre_hook(lambda _, x: torch.arange(x[0].shape[-1])[None])
    with pytest.raises(PlanError, match=r"differ by up to .* from those of the same example alone"):
        check(model)


def test_masks_that_ignore_the_batch() -> None:
    """As flash attention, which tells examples apart in batches of one row only."""
    model = ready(_APART["llama"])

    def forget(_: Any, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if len(named["input_ids"]) > 1:
            named["position_ids"] = None
        return args, named

    model.model.register_forward_pre_hook(forget, with_kwargs=True)
    check(model, together=False)
    with pytest.raises(PlanError, match=r"model\.layers\.0\.self_attn \(LlamaAttention\)"):
        check(model, together=True)


def test_rows_of_one_example_mix_nothing() -> None:
    check(ready(_MIXING["lfm2"][1]), pack_examples(examples(), 30))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_training_is_refused_before_it_begins(tmp_path: Path, batch_size: int) -> None:
    ready(_MIXING["lfm2"][1]).save_pretrained(tmp_path / "base")
    with pytest.raises(PlanError, match=r"train\.packing: layers such as model\.layers\.0\.conv"):
        run_training(tmp_path / "base", tmp_path / "work", method="full", packing=True, batch_size=batch_size)
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["history.jsonl", "run.json"]
    assert not (tmp_path / "work" / "history.jsonl").read_text()
    run_training(tmp_path / "base", tmp_path / "other", method="full", batch_size=batch_size)


def test_training_gpt_oss_packed_and_not(tmp_path: Path) -> None:
    """One step over all examples: the same loss."""
    ready(make_gpt_oss).save_pretrained(tmp_path / "base")
    options: dict[str, Any] = {"method": "full", "steps": 1, "batch_size": 64}
    losses = {
        packing: run_training(tmp_path / "base", tmp_path / str(packing), packing=packing, **options).final_loss
        for packing in (False, True)
    }
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


def test_the_check_leaves_training_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: what is random afterwards, and the model's mode."""
    base = make_base(tmp_path / "base", attention_dropout=0.3)
    checked = run_training(base, tmp_path / "checked", packing=True)
    monkeypatch.setattr("soka_serve.compiler.train.trainer.check_packing", lambda *a, **k: None)
    unchecked = run_training(base, tmp_path / "unchecked", packing=True)
    assert (checked.directory / "adapter_model.safetensors").read_bytes() == (
        unchecked.directory / "adapter_model.safetensors"
    ).read_bytes()
