"""Tiny random models under the hub ids that PEFT's tests ask for, as folders: `FOLDER/owner/name`.

The ids are taken for paths when the tests run in FOLDER, so nothing is fetched. The models have the architectures of
those they stand for, and no other values in common with them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers as t
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

SMALL: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 256, "initializer_range": 0.1,
}  # fmt: skip
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, **SPECIAL}
GPT = {"vocab_size": 384, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.1}
OPT = {**SMALL, "hidden_size": 16, "ffn_dim": 48, "word_embed_proj_dim": 16, **SPECIAL}
SEQ2SEQ = {
    "vocab_size": 384, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 256,
    "init_std": 0.1, **SPECIAL, "decoder_start_token_id": 2,
}  # fmt: skip
T5 = {
    "vocab_size": 384, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
    "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip
BERT = {**SMALL, "pad_token_id": 0}

PEFT, HF, TRL = "peft-internal-testing", "hf-internal-testing", "trl-internal-testing"
# By id: the names of the classes of the model and of its config in transformers, and the config's settings.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    f"{PEFT}/tiny-random-OPTForCausalLM": ("OPTForCausalLM", "OPTConfig", OPT),
    f"{PEFT}/opt-125m": ("OPTForCausalLM", "OPTConfig", OPT),
    f"{PEFT}/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", "GPT2Config", GPT),
    f"{HF}/tiny-random-gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT),
    f"{PEFT}/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4}),
    f"{TRL}/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    f"{PEFT}/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    f"{PEFT}/tiny-dummy-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    f"{HF}/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**LLAMA, "sliding_window": 64}),
    f"{HF}/tiny-random-MistralForCausalLM": ("MistralForCausalLM", "MistralConfig", LLAMA),
    f"{PEFT}/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ),
    f"{PEFT}/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", "T5Config", T5),
    f"{PEFT}/tiny-random-t5": ("T5ForConditionalGeneration", "T5Config", T5),
    f"{PEFT}/tiny-random-BertModel": ("BertModel", "BertConfig", BERT),
    f"{PEFT}/tiny-random-RobertaModel": ("RobertaModel", "RobertaConfig", BERT),
    f"{PEFT}/tiny-random-DebertaModel": (
        "DebertaModel",
        "DebertaConfig",
        {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    f"{PEFT}/tiny-random-DebertaV2Model": ("DebertaV2Model", "DebertaV2Config", BERT),
    f"{PEFT}/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", "BertConfig", BERT),
    f"{PEFT}/tiny-random-RobertaForSequenceClassification": ("RobertaForSequenceClassification", "RobertaConfig", BERT),
    f"{TRL}/tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", "LlamaConfig", LLAMA),
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
    for name, (model, of_model, settings) in MODELS.items():
        place = folder / name
        if not (place / "config.json").exists():
            torch.manual_seed(0)
            getattr(t, model)(getattr(t, of_model)(**settings)).save_pretrained(place)
            _tokenizer().save_pretrained(place)
    config = folder / "peft-internal-testing" / "tiny-opt-lora-revision" / "adapter_config.json"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "target_modules": ["q_proj"]}))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
