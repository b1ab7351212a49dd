"""Which tensors an index may name though no file holds them: those that the model does without.

transformers and vLLM read the files that an index names, and every tensor in them; the names in it count for neither.
So an index is wrong only where it names what the model needs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Buffers that models compute and old checkpoints hold; transformers passes over them, too.
_BUFFERS = re.compile(r"(?:^|\.)(?:rotary_emb\.inv_freq|position_ids|(?:attn|attention)\.(?:masked_)?bias)$")
_HEAD = re.compile(r"(?:^|\.)lm_head\.weight$")


def is_optional(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a model does without the tensor of that name.

    >>> is_optional("lm_head.weight", {"tie_word_embeddings": True})
    True
    >>> is_optional("model.norm.weight", {"tie_word_embeddings": True})
    False
    """
    return _BUFFERS.search(name) is not None or (_HEAD.search(name) is not None and ties_embeddings(config))


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether the model's output head is its embedding: by its config or, where that is silent, by its class."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        if isinstance(said := part.get("tie_word_embeddings"), bool):
            return said
    return _is_tied_by_default(config.get("model_type"))


def _is_tied_by_default(kind: object) -> bool:
    """What transformers' config class of a model type says, read from its source: importing it takes seconds."""
    spec = find_spec("transformers")
    if not isinstance(kind, str) or spec is None or spec.origin is None:
        return False
    named = re.compile(rf'^    model_type\s*(?::[^=]+)?=\s*"{re.escape(kind)}"', re.M)
    for file in Path(spec.origin).parent.glob("models/*/configuration_*.py"):
        for body in file.read_text(encoding="utf-8").split("\nclass ")[1:]:
            if named.search(body):
                return re.search(r"\btie_word_embeddings(?::\s*bool)?\s*=\s*True", body) is not None
    return False
