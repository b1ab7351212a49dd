"""Tiny random models under the hub ids that PEFT's tests ask for, as folders: `FOLDER/owner/name`.

The ids are taken for paths when the tests run in FOLDER, so nothing is fetched. The models have the architectures of
those they stand for, and no other values in common with them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

SMALL: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
LLAMA = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"vocab_size": 384, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.1}
OPT = {
    **SMALL,
    "hidden_size": 16,
    "ffn_dim": 48,
    "word_embed_proj_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEQ2SEQ = {
    "vocab_size": 384, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 256,
    "init_std": 0.1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
T5 = {
    "vocab_size": 384, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
    "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip
BERT = {**SMALL, "pad_token_id": 0}


def _models() -> dict[str, Callable[[], Any]]:
    gemma = {**LLAMA, "sliding_window": 64}
    return {
        "peft-internal-testing/tiny-random-OPTForCausalLM": lambda: t.OPTForCausalLM(t.OPTConfig(**OPT)),
        "peft-internal-testing/opt-125m": lambda: t.OPTForCausalLM(t.OPTConfig(**OPT)),
        "peft-internal-testing/tiny-random-GPT2LMHeadModel": lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT)),
        "hf-internal-testing/tiny-random-gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT)),
        "peft-internal-testing/tiny-random-GPTJForCausalLM": lambda: t.GPTJForCausalLM(
            t.GPTJConfig(**GPT, rotary_dim=4)
        ),
        "trl-internal-testing/tiny-random-LlamaForCausalLM": lambda: t.LlamaForCausalLM(t.LlamaConfig(**LLAMA)),
        "peft-internal-testing/tiny-random-LlamaForCausalLM": lambda: t.LlamaForCausalLM(t.LlamaConfig(**LLAMA)),
        "peft-internal-testing/tiny-dummy-qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**LLAMA)),
        "hf-internal-testing/tiny-random-Gemma3ForCausalLM": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**gemma)),
        "hf-internal-testing/tiny-random-MistralForCausalLM": lambda: t.MistralForCausalLM(t.MistralConfig(**LLAMA)),
        "peft-internal-testing/tiny-random-BartForConditionalGeneration": lambda: t.BartForConditionalGeneration(
            t.BartConfig(**SEQ2SEQ)
        ),
        "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": lambda: t.T5ForConditionalGeneration(
            t.T5Config(**T5)
        ),
        "peft-internal-testing/tiny-random-t5": lambda: t.T5ForConditionalGeneration(t.T5Config(**T5)),
        "peft-internal-testing/tiny-random-BertModel": lambda: t.BertModel(t.BertConfig(**BERT)),
        "peft-internal-testing/tiny-random-RobertaModel": lambda: t.RobertaModel(t.RobertaConfig(**BERT)),
        "peft-internal-testing/tiny-random-DebertaModel": lambda: t.DebertaModel(
            t.DebertaConfig(**BERT, relative_attention=True, pos_att_type=["c2p", "p2c"])
        ),
        "peft-internal-testing/tiny-random-DebertaV2Model": lambda: t.DebertaV2Model(t.DebertaV2Config(**BERT)),
        "peft-internal-testing/tiny-random-BertForSequenceClassification": lambda: t.BertForSequenceClassification(
            t.BertConfig(**BERT)
        ),
        "peft-internal-testing/tiny-random-RobertaForSequenceClassification": lambda: (
            t.RobertaForSequenceClassification(t.RobertaConfig(**BERT))
        ),
        "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": lambda: t.LlamaForSequenceClassification(
            t.LlamaConfig(**LLAMA)
        ),
    }


def _tokenizer() -> t.PreTrainedTokenizerFast:
    """One token per byte."""
    vocabulary = {name: place for place, name in enumerate(["<pad>", "<s>", "</s>", "<unk>", *ByteLevel.alphabet()])}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return t.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make(folder: Path) -> None:
    """Make all stand-ins; those that are there stay."""
    for name, build in _models().items():
        place = folder / name
        if not (place / "config.json").exists():
            torch.manual_seed(0)
            build().save_pretrained(place)
            _tokenizer().save_pretrained(place)
    config = folder / "peft-internal-testing" / "tiny-opt-lora-revision" / "adapter_config.json"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "target_modules": ["q_proj"]}))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
