"""Whether a checkpoint's weights are plain floating-point numbers, to which a delta can be added."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from soka_serve.base.quantisation import Quantisation
from soka_serve.errors import CheckpointError, printable
from soka_serve.io.safetensors import FLOAT_DTYPES, TensorInfo

# What quantised checkpoints call packed weights.
_PACKED = (".qweight", ".weight_packed")
_NARROW = ("F4", "F6", "F8")


def check_unquantised(found: Quantisation | None, directory: Path) -> None:
    """Refuse a checkpoint that its config calls quantised.

    Raises:
        CheckpointError: names the place, the method and what to give instead.
    """
    if found is not None:
        raise CheckpointError(
            f"{found.place}: the weights are quantised ({found.to_text()}); adapters are planned, trained, extracted "
            "and merged on plain weights only",
            hint='give the unquantised checkpoint that it was made from, with base.quantize = "4bit" to train on 4 '
            f"bits of it; an adapter of that is served on this one: soka-serve serve ADAPTER --base {directory}",
        )


def check_plain_weights(tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse a checkpoint whose weights are stored in what training and merging cannot keep.

    transformers converts any dtype to the model's by value. For integers, and for narrow floats whose scales are not
    named in a config, those are other weights than were meant; and a sum could not be stored in their dtype.

    Args:
        tensors: its headers (`Checkpoint.tensors`).

    Raises:
        CheckpointError: names a tensor, and what to give instead.
    """
    wrong = [info for name, info in tensors.items() if info.dtype not in FLOAT_DTYPES and _is_weight(name, info.dtype)]
    if not wrong:
        return
    first, kinds = wrong[0], ", ".join(sorted({info.dtype for info in wrong}))
    more = f" and {len(wrong) - 1} more tensors" if len(wrong) > 1 else ""
    raise CheckpointError(
        f"{first.file}: {printable(first.name)}{more}: weights stored as {kinds}, and config.json says nothing of "
        f"quantisation; expected {', '.join(sorted(FLOAT_DTYPES))}",
        hint="give the original checkpoint; or, if the stored values are the weights themselves, without scales, "
        'convert them once: AutoModelForCausalLM.from_pretrained(DIR, dtype="bfloat16").save_pretrained(NEW_DIR)',
    )


def _is_weight(name: str, dtype: str) -> bool:
    """Whether a tensor of another dtype holds weights; masks, positions and tables of token ids do not."""
    return name.endswith((".weight", *_PACKED)) or dtype.startswith(_NARROW)
