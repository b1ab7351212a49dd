"""LLaMA checkpoints with generated weights, and the start of an adapter on them, for several benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from eval.bench.kpsvd import draw_weight
from soka_serve.base.base import Base
from soka_serve.base.target_modules import TargetModule, resolve_targets
from soka_serve.io.progress import track
from soka_serve.kron import Factors
from soka_serve.kron.shapes import balanced_shape
from soka_serve.manifest.schema import Manifest

VOCABULARY = 64
LARGE = "mlp.up_proj"
SMALL = "self_attn.q_proj"


def sizes(hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    """(out, in) of a layer's projections."""
    attention = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    return attention | {"mlp.gate_proj": (inner, hidden), LARGE: (inner, hidden), "mlp.down_proj": (hidden, inner)}


def write_model(
    folder: Path,
    hidden: int,
    inner: int,
    layers: int,
    *,
    kind: str = "decaying",
    noise: float = 0.0,
    vocabulary: int = VOCABULARY,
    tied: bool = True,
) -> None:
    """A LLaMA checkpoint in bfloat16, a file per layer; in memory lies one layer.

    `kind` is the spectrum of the weights (`draw_weight`), another draw for every projection; `noise` times a random
    matrix is added to each (a "fine-tuned" one). Embeddings of so many tokens are the output head, too, where `tied`.
    """
    folder.mkdir(parents=True)
    heads = max(hidden // 128, 1)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "tie_word_embeddings": tied, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    where: dict[str, str] = {}
    generator = torch.Generator().manual_seed(1)
    with track(layers, "writing the model", unit="layer") as step:
        for layer in range(layers):
            tensors: dict[str, torch.Tensor] = {}
            for number, (name, size) in enumerate(sizes(hidden, inner).items()):
                weight = draw_weight(kind, *size, seed=7 * layer + number)
                weight *= size[1] ** -0.5 / weight.square().mean().sqrt()
                if noise:
                    weight += noise * size[1] ** -0.5 * torch.randn(size, generator=generator)
                tensors[f"model.layers.{layer}.{name}.weight"] = weight
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(hidden)
            if layer == 0:
                embeddings = torch.randn(vocabulary, hidden, generator=torch.Generator().manual_seed(2))
                tensors |= {"model.embed_tokens.weight": embeddings, "model.norm.weight": torch.ones(hidden)}
            if layer == layers - 1 and not tied:
                head = torch.randn(vocabulary, hidden, generator=torch.Generator().manual_seed(3))
                tensors["lm_head.weight"] = head * hidden**-0.5
            file = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
            save_file({k: v.bfloat16() for k, v in tensors.items()}, folder / file, metadata={"format": "pt"})
            where |= dict.fromkeys(tensors, file)
            step(file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def start_of(base: Path, rule: dict[str, Any]) -> tuple[Manifest, Base, list[TargetModule]]:
    """A manifest with one rule on a checkpoint, the checkpoint opened, and what the rule adapts.

    The rule starts from the weights unless it says otherwise.
    """
    train = {"steps": 0, "data": {"builtin": "math"}}
    manifest = Manifest.model_validate(
        {"schema": 1, "base": {"path": str(base)}, "adapt": [{"init": "weights"} | rule], "train": train}
    )
    opened = Base(base)
    return manifest, opened, resolve_targets(manifest, opened.layout.modules)


def random_factors(
    shapes: dict[str, tuple[int, int]], rank: int, generator: torch.Generator | None = None
) -> dict[str, Factors]:
    """Small factors at the balanced shapes of projections, given as (out, in)."""
    factors = {}
    for name, size in shapes.items():
        m, n, p, q = balanced_shape(*size)
        left, right = (torch.randn(rank, *part, generator=generator) for part in ((m, n), (p, q)))
        factors[name] = Factors(left, right, torch.full((rank,), 1e-3))
    return factors
