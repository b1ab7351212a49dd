"""Tiny random LLaMA checkpoints and adapters for tests of merge, export and inspect."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from soka_serve.adapter.format import write_adapter
from soka_serve.base.base import Base
from soka_serve.base.checkpoint import Checkpoint
from soka_serve.builtin import base_directory
from soka_serve.compiler.merge.merge import merge
from soka_serve.kron import Factors
from soka_serve.kron.shapes import balanced_shape

SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}


def small_config(**changes: Any) -> LlamaConfig:
    """A LLaMA of two layers, hidden 64, two heads on one key-value head, but for `changes`."""
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    return LlamaConfig(**sizes | changes)


def write_base(
    directory: Path, *, dtype: torch.dtype = torch.bfloat16, tied: bool = False, shard: str = "60KB", seed: int = 0
) -> Path:
    """Such a LLaMA, with the files a real one has."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(small_config(tie_word_embeddings=tied))
    for parameter in model.parameters():  # as large as trained weights, so that logits are not all alike
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard)
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    (directory / "special_tokens_map.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "LICENSE.txt").write_text("licence")
    return directory


def random_factors(out_features: int, in_features: int, rank: int, seed: int, scale: float = 0.05) -> Factors:
    """Factors of the balanced shape whose delta has about `scale` per entry."""
    generator = torch.Generator().manual_seed(seed)
    m, n, p, q = balanced_shape(out_features, in_features)
    left = torch.randn(rank, m, n, generator=generator)
    right = torch.randn(rank, p, q, generator=generator)
    return Factors(left, right, scale * (0.5 + torch.rand(rank, generator=generator)))


def all_factors(*, rank: int = 3, seed: int = 1, layers: int = 2) -> dict[str, Factors]:
    """Factors for every projection of `write_base`'s model; ranks differ between modules."""
    return {
        f"model.layers.{layer}.{name}": random_factors(*shape, rank + i % 2, seed * 1000 + layer * 10 + i)
        for layer in range(layers)
        for i, (name, shape) in enumerate(SHAPES.items())
    }


def write_test_adapter(
    directory: Path, factors: Mapping[str, Factors] | None = None, *, base: Path | None = None, **options: Any
) -> Path:
    """A finished adapter with lock and card; the lock names `base`'s weights if it is given."""
    lock: dict[str, Any] = {"soka": 1, "seed": 0}
    if base is not None:
        lock["base"] = {"name": base.name, "sha256": Checkpoint.open(base).sha256()}
    factors = all_factors() if factors is None else factors
    write_adapter(directory, factors, base_model="tiny-test-base", lock=lock, card="# test\n", **options)
    return directory


def merge_quietly(adapter: Path, base: Path, out: Path, **options: object) -> None:
    """Merge one adapter, without a check unless one is asked for."""
    merge(adapter, base=base, out=out, progress=False, **{"verify": False, **options})  # type: ignore[arg-type]


class WithoutBos:
    """The embedded base's tokenizer, as one that puts nothing before a text."""

    def __init__(self) -> None:
        self.own = Base(base_directory()).tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def encode_pairs(self, pairs: Any, **options: Any) -> Any:
        return self.own.encode_pairs(pairs, add_special_tokens=False)
