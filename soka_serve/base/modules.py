"""What a base is made of: its linear projections, its size, and what of it no rule can adapt. No torch, no files.

For LLaMA-like architectures everything follows from config.json (`llama_parameters`, `modules_from_config`); for the
others `soka_serve.base.meta_model` asks transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soka_serve.base.weight_map import WeightMap
from soka_serve.errors import CheckpointError, first_ten
from soka_serve.io.safetensors import STORED_NAMES, bits_of

# Architectures whose layers hold exactly these seven projections as plain nn.Linear, under these names.
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma")

# Where transformers keeps what config.json says of the language model in a multimodal base.
_TEXT_CONFIGS = ("text_config", "language_config", "llm_config", "decoder")

_NUMBER = re.compile(r"\.\d+(?=\.|$)")
_ORDER = {name: place for place, name in enumerate(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"))}
_PATTERNS_SHOWN = 6


@dataclass(frozen=True)
class Module:
    """A linear projection of the base.

    `name` is the full module name in the model ('model.layers.0.self_attn.q_proj'), `layer` its layer number, and
    `dtype` the weight's dtype as stored, in torch's spelling ('bfloat16').
    """

    name: str
    out_features: int
    in_features: int
    layer: int | None
    dtype: str

    @property
    def projection(self) -> str:
        """The name's last component: 'q_proj'."""
        return self.name.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class ModuleExclusion:
    """Modules of the base that are not adapted, and why; `shown` stands for them where there are many of them."""

    names: tuple[str, ...]
    reason: str
    shown: tuple[str, ...] = ()

    def to_text(self) -> str:
        """One line: names that differ in numbers only are one.

        >>> ModuleExclusion(("model.layers.0.mlp.gate", "model.layers.1.mlp.gate"), "a router").to_text()
        'model.layers.*.mlp.gate (a router)'
        """
        return f"{name_patterns(self.shown or self.names)} ({self.reason})"


@dataclass(frozen=True)
class ModelSize:
    """How large a base is. Parameters are counts; `linear` are those of the projections inside the layers.

    `parameters` counts what the model has, each tied weight once; `weight_bytes` is what its checkpoint stores of it.
    """

    parameters: int
    linear: int
    weight_bytes: int
    dtype: str
    hidden: int
    vocabulary: int
    layers: int


@dataclass(frozen=True)
class BaseModules:
    """The modules of a base.

    Args:
        modules: the linear projections inside the language model's layers, in layer order.
        size: the model's.
        left_out: modules that have a weight and cannot be adapted.
        unused: tensors of the checkpoint that the model does not have.
        weights: where the checkpoint keeps each module's weight.
    """

    modules: tuple[Module, ...]
    size: ModelSize
    left_out: tuple[ModuleExclusion, ...] = ()
    unused: tuple[str, ...] = ()
    weights: WeightMap = field(default_factory=lambda: WeightMap({}))

    def describe_unused(self) -> str | None:
        """One line on the tensors that the model does not use; None where it uses all."""
        if not self.unused:
            return None
        owners = {name.rpartition(".")[0] for name in self.unused}
        return (
            f"the checkpoint has {len(self.unused)} tensors of {len(owners)} modules that the model does not use, such "
            f"as {self.unused[0]}"
        )


def misfit(directory: Path, problems: Sequence[str]) -> CheckpointError:
    """The error for a checkpoint whose tensors are not those that its config.json makes."""
    return CheckpointError(
        "\n".join(f"{directory}: {line}" for line in first_ten(problems)),
        hint="the checkpoint is not whole, or of another model than its config.json; copy it again",
    )


def name_patterns(names: Sequence[str]) -> str:
    """Names with '*' for their numbers, each once; the first six, and how many more there are.

    >>> name_patterns(["a.0.b", "a.1.b", "c"])
    'a.*.b, c'
    """
    patterns = list(dict.fromkeys(_NUMBER.sub(".*", name) for name in names))
    more = f" and {len(patterns) - _PATTERNS_SHOWN} more" if len(patterns) > _PATTERNS_SHOWN else ""
    return ", ".join(patterns[:_PATTERNS_SHOWN]) + more


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says of the language model: its own table in a multimodal base, over the rest.

    >>> text_config({"model_type": "gemma3", "text_config": {"hidden_size": 8}})["hidden_size"]
    8
    """
    inner: dict[str, Any] = next((config[key] for key in _TEXT_CONFIGS if isinstance(config.get(key), dict)), {})
    return {**config, **inner}


def in_layer_order(modules: Sequence[Module]) -> tuple[Module, ...]:
    """Modules by layer; within one, attention before the MLP where they have LLaMA's names, then by name."""
    return tuple(sorted(modules, key=lambda m: (m.layer or 0, _ORDER.get(m.projection, len(_ORDER)), m.name)))


# --------------------------------------------------------------------------------------------------- from a config


def modules_from_config(config: Mapping[str, Any], *, source: Path | str = "config.json") -> list[Module]:
    """Derive the projections of a LLaMA-like model from its config.

    Raises:
        CheckpointError: an architecture we cannot derive, or dimensions that are missing or impossible.
    """
    kind = config.get("model_type")
    if kind not in LLAMA_LIKE:
        raise CheckpointError(
            f"{source}: model_type {kind!r}: the projections cannot be derived from the config alone; expected one of "
            f"{', '.join(LLAMA_LIKE)}",
            hint="With the weights on disk (base.path) transformers lists the modules of any architecture it knows.",
        )
    required = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    wrong = [f"{key} = {config.get(key)!r}" for key in required if not _positive(config.get(key))]
    optional = [key for key in ("num_key_value_heads", "head_dim") if config.get(key) is not None]
    wrong += [f"{key} = {config[key]!r}" for key in optional if not _positive(config[key])]
    if wrong:
        raise CheckpointError(f"{source}: expected positive whole numbers; got {', '.join(wrong)}")
    hidden, inner, layers, heads = (int(config[key]) for key in required)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    if config.get("head_dim") is None and hidden % heads:
        raise CheckpointError(f"{source}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    shapes = {
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (kv_heads * head_dim, hidden),
        "self_attn.v_proj": (kv_heads * head_dim, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return [
        Module(f"model.layers.{layer}.{name}", out_features, in_features, layer, dtype)
        for layer in range(layers)
        for name, (out_features, in_features) in shapes.items()
    ]


def llama_parameters(config: Mapping[str, Any], modules: Sequence[Module]) -> dict[str, tuple[int, ...]]:
    """Every parameter of a LLaMA-like model with its shape; a tied output head is the embedding's and not listed.

    Args:
        config: its config.json.
        modules: what `modules_from_config` derives from it.
    """
    hidden, vocabulary = int(config["hidden_size"]), int(config["vocab_size"])
    kind = config["model_type"]
    biased: tuple[str, ...] = ()
    if kind == "qwen2":
        biased = ("q_proj", "k_proj", "v_proj")
    elif config.get("attention_bias"):
        biased = ("q_proj", "k_proj", "v_proj", "o_proj")
    if config.get("mlp_bias"):
        biased += ("gate_proj", "up_proj", "down_proj")
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for module in modules:
        shapes[f"{module.name}.weight"] = (module.out_features, module.in_features)
        if module.projection in biased:
            shapes[f"{module.name}.bias"] = (module.out_features,)
    head_dim = int(config.get("head_dim") or hidden // int(config["num_attention_heads"]))
    for layer in range(int(config["num_hidden_layers"])):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (hidden,)
        if kind == "qwen3":
            for norm in ("q_norm", "k_norm"):
                shapes[f"model.layers.{layer}.self_attn.{norm}.weight"] = (head_dim,)
    shapes["model.norm.weight"] = (hidden,)
    if not is_tied(config):
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def size_from_config(
    config: Mapping[str, Any], modules: Sequence[Module], *, source: Path | str = "config.json"
) -> ModelSize:
    """Count a LLaMA-like model's parameters from its config and its projections.

    Raises:
        CheckpointError: the config has no vocab_size.
    """
    if not _positive(config.get("vocab_size")):
        raise CheckpointError(
            f"{source}: expected a positive whole number for vocab_size; got {config.get('vocab_size')!r}"
        )
    total = sum(math.prod(shape) for shape in llama_parameters(config, modules).values())
    dtype = modules[0].dtype if modules else "float32"
    return ModelSize(
        parameters=total,
        linear=sum(m.out_features * m.in_features for m in modules),
        weight_bytes=total * dtype_bytes(dtype),
        dtype=dtype,
        hidden=int(config["hidden_size"]),
        vocabulary=int(config["vocab_size"]),
        layers=int(config["num_hidden_layers"]),
    )


def dtype_bytes(dtype: str) -> int:
    """Bytes of an element; 2 for a dtype we do not know."""
    return bits_of(STORED_NAMES.get(dtype, "BF16")) // 8


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a LLaMA-like model's output head is its embedding."""
    return bool(config.get("tie_word_embeddings", config.get("model_type") == "gemma"))


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
