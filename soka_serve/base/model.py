"""Loading the base model for training: plain, or held in 8 or 4 bits."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from soka_serve.base.pretrained import BUILD_ERRORS, cannot_build, first_line, open_model, quiet
from soka_serve.errors import BuildError, CheckpointError, install_extra
from soka_serve.kron.cpu import has_amx

logger = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantize = Literal["none", "8bit", "4bit"]

# Names of tensors that an error lists before it only counts them.
_NAMES_SHOWN = 3


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Without the progress bars that transformers shows for each file: there is one bar, ours."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def load_base(
    directory: Path, dtype: Dtype = "auto", quantize: Quantize = "none", *, device: torch.device | None = None
) -> PreTrainedModel:
    """Read a causal language model from a local checkpoint (safetensors only, no remote code).

    Args:
        directory: a Hugging Face checkpoint directory.
        dtype: dtype in which the weights are held; "auto" is the checkpoint's own. With `quantize`, the dtype of what
            stays unquantised and of the computation.
        quantize: hold the linear layers in 8 (LLM.int8) or 4 bits (NF4, double quantisation) through bitsandbytes.
        device: where a quantised model is placed; default: the current accelerator, or the CPU. A plain model stays
            on the CPU, the Trainer moves it.

    Returns:
        The model in evaluation mode, every parameter present.

    Raises:
        CheckpointError: missing, truncated or malformed files, an architecture that transformers does not know or that
            needs the checkpoint's own code, or tensors that are missing or of another shape than the config says.
        BuildError: bitsandbytes is not installed.
    """
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory}: no config.json: not a model directory",
            hint="give the directory that holds config.json and the *.safetensors files",
        )
    options: dict[str, Any] = {}
    if quantize != "none":
        options["quantization_config"] = quantization_config(quantize, dtype)
        options["device_map"] = {"": device or _default_device()}
    try:
        with quiet_bars(), quiet():  # its table of tensors that do not fit is raised or logged below
            model, info = open_model(
                directory,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in the info, and refused below
                **options,
            )
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{directory}: the base model cannot be read: {first_line(error)}",
            hint="the files may be incomplete; download or copy the checkpoint again (safetensors files are needed)",
        ) from error
    except BUILD_ERRORS as error:
        raise cannot_build(directory, error) from error
    _check_loading(directory, info)
    if quantize == "4bit":
        _keep_weights(model)
    loaded: PreTrainedModel = model
    return loaded


def auto_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which "auto" holds a base while it is trained or walked.

    It is the checkpoint's own, but float32 for half precision on a CPU without AMX: on Intel's without it a step on a
    base in bfloat16 takes about twice as long as in float32. On AMD's with AVX-512 for bfloat16 it takes 0.75 of the
    time (both: eval/results/step_smollm2.json), but results so do not depend on which of the two it is.

    Args:
        stored: the checkpoint's dtype.
        device: where the model runs.
    """
    return torch.float32 if stored.itemsize < 4 and device.type == "cpu" and not has_amx() else stored


def held_dtype(dtype: Dtype, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which a plain base is held while it is trained or walked.

    Args:
        dtype: what the manifest says.
        stored: the checkpoint's dtype.
        device: where the model runs.
    """
    named: torch.dtype = auto_dtype(stored, device) if dtype == "auto" else getattr(torch, dtype)
    return named


def quantization_config(quantize: Quantize, dtype: Dtype) -> BitsAndBytesConfig:
    """How a base is held in 8 or 4 bits.

    Raises:
        BuildError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BuildError(
            f"base.quantize = {quantize!r} needs bitsandbytes, which is not installed",
            hint=f'{install_extra("kbit")}; or set base.quantize = "none"',
        )
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def _keep_weights(model: PreTrainedModel) -> None:
    """Have bitsandbytes leave the 4-bit weights as they are.

    On CPUs with AVX-512 bfloat16 its first evaluation repacks every weight for a kernel of its own: with scales rounded
    to bfloat16, so that evaluation and training see different bases, and with an error for input sizes that are no
    multiple of the block size (bitsandbytes 0.50).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _check_loading(directory: Path, info: dict[str, Any]) -> None:
    """Refuse a checkpoint that lacks tensors; transformers would fill them with random numbers and a warning."""
    problems = []
    for key, what in (("missing_keys", "missing"), ("mismatched_keys", "not of the shape that config.json asks for")):
        found = sorted(str(name[0] if isinstance(name, tuple) else name) for name in info.get(key) or ())
        if found:
            more = f" and {len(found) - _NAMES_SHOWN} more" if len(found) > _NAMES_SHOWN else ""
            problems.append(f"tensors {what}: {', '.join(found[:_NAMES_SHOWN])}{more}")
    if problems:
        raise CheckpointError(f"{directory}: {'; '.join(problems)}", hint="the checkpoint is not whole; copy it again")
    if unexpected := sorted(map(str, info.get("unexpected_keys") or ())):
        # A build says so once, at its start (`context.tell_left_out`), and loads the base several times.
        logger.debug("%s: the model does not use %d tensors: %s", directory, len(unexpected), unexpected[:3])
