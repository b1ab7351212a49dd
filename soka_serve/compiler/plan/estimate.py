"""The device memory of a training run, worked out from shapes.

The memory of a training run is an estimate: it counts what must be held at the same time, from the formulas below, and
leaves out what only a run can tell (fragmentation, kernels' workspaces beyond `OVERHEAD_BYTES`). It was
never held against a real run on a GPU.

- Base: parameters x bytes of its dtype. 8-bit: linear projections 1 byte each; 4-bit: half a byte and a float32 scale
  per 64 weights; embeddings and norms keep the dtype.
- Trained parameters: float32 weight, gradient and AdamW's two moments, 16 bytes each; and 4 bytes for factors that are
  not trained, and for the frozen initial ones that `init = "weights"` and "gradient" subtract. Full fine-tuning trains
  the base itself in float32.
- Activations kept for the backward, per token and layer: 6h + 2a + 2k + 4f elements (h hidden, a and k the widths of
  the query and key projections, f the MLP's width): per norm its input, its float32 copy and its output; q, k, v and
  the attention's output; gate, its activation, up, and their product. Attention is taken to be fused (SDPA): nothing
  of size tokens x tokens is kept. With gradient checkpointing: h per token and layer, and one layer in full.
- Logits: per token and word the logits in the computing dtype and float32 copies of them and of their gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from soka_serve.base.modules import ModelSize, Module, dtype_bytes

OVERHEAD_BYTES = 800 * 1024**2  # CUDA context, libraries' workspaces

_TRAINED_BYTES = 16  # float32 weight, gradient, two AdamW moments


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated device memory of training, bytes."""

    base: int
    trained: int
    activations: int
    logits: int
    overhead: int = OVERHEAD_BYTES

    @property
    def total(self) -> int:
        """Everything together."""
        return self.base + self.trained + self.activations + self.logits + self.overhead


@dataclass(frozen=True)
class TrainingSetup:
    """What the memory of a run depends on, but for its method.

    Args:
        size: the base.
        modules: its projections (all, not only the adapted ones).
        tokens: tokens of one batch, batch_size x max_length.
        base_dtype: dtype the base is held in.
        quantize: bits of the base's projections.
        precision: autocast dtype of the computation.
        gradient_checkpointing: recompute activations in the backward.
    """

    size: ModelSize
    modules: Sequence[Module]
    tokens: int
    base_dtype: str
    quantize: Literal["none", "8bit", "4bit"]
    precision: str
    gradient_checkpointing: bool


def estimate_memory(setting: TrainingSetup, *, trained: int | None, frozen: int = 0) -> MemoryEstimate:
    """Estimate the device memory of one training process, bytes. The module's docstring has the formulas.

    Args:
        setting: base, batch and precision.
        trained: trained parameters of an adapter; None for full fine-tuning, which trains the base itself.
        frozen: parameters of frozen factors: initial ones, and those that are not trained.
    """
    size, tokens = setting.size, setting.tokens
    width = dtype_bytes(setting.base_dtype)
    if trained is None:
        base, trained_bytes = 0, size.parameters * _TRAINED_BYTES
    else:
        per_weight = {"none": float(width), "8bit": 1.0, "4bit": 0.5 + 4 / 64}[setting.quantize]
        base = int(size.linear * per_weight) + (size.parameters - size.linear) * width
        trained_bytes = trained * _TRAINED_BYTES + frozen * 4
    element = dtype_bytes(setting.precision)
    modules = setting.modules
    first = [m for m in modules if m.layer == modules[0].layer] if modules else []
    widths = {m.projection: m.out_features for m in first}
    query = widths.get("q_proj", size.hidden)
    key = widths.get("k_proj", query)
    mlp = max(widths.get("up_proj", 0), widths.get("gate_proj", 0), *(m.in_features for m in first), size.hidden)
    per_layer = tokens * element * (6 * size.hidden + 2 * query + 2 * key + 4 * mlp)
    if setting.gradient_checkpointing:
        activations = size.layers * tokens * size.hidden * element + per_layer
    else:
        activations = size.layers * per_layer
    logits = tokens * size.vocabulary * (element + 8)
    return MemoryEstimate(base, trained_bytes, activations, logits)
