"""Tiny random checkpoints of the architectures that docs/serving.md lists, each with an adapter on all its projections,
and what a server and transformers say of them. For tests/e2e/test_served_models.py and eval/checks/served_models.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from soka_serve.adapter.format import write_adapter
from soka_serve.base.checkpoint import Checkpoint
from soka_serve.kron import Factors
from soka_serve.serving.command import ServeOptions
from soka_serve.serving.serve import plan_launch
from tests.support.serving import Server, free_port, running
from tests.support.tiny_models import random_factors

VOCABULARY = 96
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
# Longer than the sliding windows below, so that they are felt.
PROMPT = [5, 17, 40, 41, 2, 77, 30, 9, 9, 61, 12, 3, 88, 54, 23, 70, 19, 33, 6, 47, 95, 11, 58, 26]

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}


@dataclass(frozen=True)
class Architecture:
    """One architecture, as small as vLLM's CPU attention takes it (heads of 32).

    Args:
        name: in the table.
        config: class of transformers' configuration.
        settings: of the configuration, beside what all have.
        attention: transformers' implementation that computes what the model is defined by.
        options: of `vllm serve`.
    """

    name: str
    config: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"
    options: tuple[str, ...] = ()


ARCHITECTURES = (
    Architecture("LLaMA with biases", "LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    Architecture("Mistral", "MistralConfig", {"sliding_window": 16, "head_dim": 32}),
    Architecture("Qwen2", "Qwen2Config"),
    Architecture("Qwen3", "Qwen3Config", {"head_dim": 32}),
    Architecture("Gemma", "GemmaConfig", {"head_dim": 32}),
    # Only its eager attention caps the scores.
    Architecture("Gemma 2", "Gemma2Config", {"head_dim": 32, "query_pre_attn_scalar": 32, **_WINDOW}, "eager"),
    Architecture("Gemma 3 (text)", "Gemma3TextConfig", {"head_dim": 32, "query_pre_attn_scalar": 32, **_WINDOW}),
    Architecture("OLMo 2", "Olmo2Config"),
    Architecture(
        "Granite",
        "GraniteConfig",
        {"embedding_multiplier": 2.0, "logits_scaling": 1.5, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    ),
    Architecture("Cohere", "CohereConfig", {"logit_scale": 0.5}),
    Architecture("SmolLM3", "SmolLM3Config", {"no_rope_layers": [1, 0]}),
)
# Its qkv_proj and gate_up_proj are one weight each.
FUSED = Architecture("Phi-3", "Phi3Config")
# Its language model is adapted and served. vLLM imports what prepares images, which needs torchvision.
MULTIMODAL = Architecture(
    "Gemma 3 (multimodal)",
    "Gemma3Config",
    {
        "text_config": {**_COMMON, **_WINDOW, "head_dim": 32, "query_pre_attn_scalar": 32},
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14,
        },
        "mm_tokens_per_image": 4, "image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92,
    },
    options=("--language-model-only",),
)  # fmt: skip
# Refused on CPUs.
EXPERTS = (
    Architecture("Mixtral", "MixtralConfig", {"num_local_experts": 4, "head_dim": 32}),
    Architecture(
        "Llama 4 (text)",
        "Llama4TextConfig",
        {"num_local_experts": 4, "head_dim": 32, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 1},
    ),
    Architecture(
        "Qwen3 MoE",
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 32, "moe_intermediate_size": 96},
    ),
    Architecture("OLMoE", "OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    Architecture("Granite MoE", "GraniteMoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
)


def write_checkpoint(directory: Path, architecture: Architecture, *, seed: int = 0) -> Path:
    """A random checkpoint in float32, with a tokenizer of one word a token."""
    torch.manual_seed(seed)
    config = getattr(transformers, architecture.config)(**{**_COMMON, **architecture.settings})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # as large as trained ones; norms and biases are not what they begin as
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.float().save_pretrained(directory)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", bos_token="w1", eos_token="w2", pad_token="w0"
    ).save_pretrained(directory)
    return directory


def write_random_adapter(directory: Path, base: Path, *, seed: int = 1) -> Path:
    """A SoKA adapter on every projection of a checkpoint's decoder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    factors: dict[str, Factors] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in PROJECTIONS and "vision" not in name:
            factors[name] = random_factors(module.out_features, module.in_features, 1 + len(factors) % 2, seed)
            seed += 1
    lock = {"soka": 1, "seed": 0, "base": {"name": base.name, "sha256": Checkpoint.open(base).sha256()}}
    write_adapter(directory, factors, base_model=str(base), lock=lock)
    return directory


def expected(base: Path, adapter: Path, architecture: Architecture) -> tuple[list[float], list[float]]:
    """Log-probability of each token of PROMPT but the first by transformers, float32: the base's, and with the adapter
    through our PEFT layers."""
    from peft import PeftModel

    import soka_serve.peft  # noqa: F401  registers peft_type SOKA

    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation=architecture.attention
    ).eval()
    plain = _logprobs(model)
    return plain, _logprobs(PeftModel.from_pretrained(model, str(adapter)).eval())


def _logprobs(model: Callable[..., Any]) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, :-1].double()
    chosen = torch.tensor(PROMPT[1:])[:, None]
    return torch.log_softmax(logits, -1).gather(1, chosen)[:, 0].tolist()


@contextmanager
def served(
    base: Path, adapter: Path, log: Path, options: tuple[str, ...] = ()
) -> Iterator[Callable[[str], list[float]]]:
    """Serve base and adapter with the command that `soka-serve serve` makes, in float32.

    Args:
        options: further ones of `vllm serve`.

    Yields:
        "base" or "adapter" -> log-probability of each token of PROMPT but the first.
    """
    vllm = ("--dtype", "float32", "--served-model-name", "base", "--max-num-seqs", "4", *options)
    _, launch = plan_launch([f"adapter={adapter}"], ServeOptions(port=free_port(), vllm=vllm), base=str(base))
    assert launch.command[1] == "-m"
    with running(launch.command[2:], Server(launch.url, log), launch.environment) as server:
        yield lambda model: server.ask_prompt(model, PROMPT)


def difference(one: list[float], other: list[float]) -> float:
    """The largest, in nats."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))
