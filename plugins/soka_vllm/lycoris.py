"""LoKr in the LyCORIS library's own files, for linear layers of language models. No vLLM.

`LycorisNetwork.save_weights` writes one safetensors file and no config. Its keys name a module by its path with "_" for
"." (`lycoris_model_layers_0_self_attn_q_proj.lokr_w1`), so it takes the served model's modules to read them.

Its scale alpha / rank is only served where it is 1. LyCORIS (up to 4.1.3, by its sources) multiplies with it once in
training, twice when it merges, and not at all in bypass mode, and it does not store whether the root of the rank was
meant: the file does not say which delta it stands for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, ones

from soka_serve.adapter import CONFIG_FILE
from soka_serve.errors import CheckpointError, SokaError
from soka_serve.headers import TensorInfo, read_header, read_tensor
from soka_serve.kron import Factors
from soka_vllm.lokr import read_matrix

PREFIX = "lycoris_"
KIND = "LyCORIS LoKr"


def find_lycoris(directory: Path) -> Path | None:
    """The LoKr file of a directory: its one safetensors file, where there is no PEFT config; else None."""
    if (directory / CONFIG_FILE).exists() or not directory.is_dir():
        return None
    files = sorted(directory.glob("*.safetensors"))
    if len(files) != 1:
        return None
    try:
        keys = read_header(files[0])
    except SokaError:
        return None
    return files[0] if any(key.partition(".")[2].startswith("lokr_") for key in keys) else None


def read_lycoris(directory: Path) -> dict[str, Factors]:
    """Read a LoKr adapter that LyCORIS wrote.

    Args:
        directory: holds the file, see `find_lycoris`.

    Returns:
        One float32 term per module, by the module's name with "_" for "."; `unflatten` gives the names.

    Raises:
        CheckpointError: everything that is wrong: made for a diffusion model, weight-decomposed, convolutions, a scale
            other than 1, tensors missing, unknown or of wrong shape, values that are not finite.
    """
    file = find_lycoris(directory)
    if file is None:
        raise CheckpointError(f"{directory}: expected one safetensors file with LyCORIS's lokr_ tensors")
    modules: dict[str, dict[str, TensorInfo]] = {}
    for key, info in read_header(file).items():
        name, _, part = key.partition(".")
        modules.setdefault(name, {})[part] = info
    factors, problems = {}, []
    for name, parts in modules.items():
        try:
            factors[name.removeprefix(PREFIX)] = _read_module(name, parts)
        except ValueError as error:
            problems.append(f"{file.name}: {name}: {error}")
    if problems:
        raise CheckpointError("\n".join(f"{directory}: {problem}" for problem in problems))
    return factors


def unflatten(adapter: Mapping[str, Factors], names: Iterable[str], prefixes: Sequence[str] = ()) -> dict[str, Factors]:
    """`read_lycoris`'s result with the dots back where a module has that name, others as they are.

    Args:
        adapter: by flattened name.
        names: of the modules that there are.
        prefixes: with which the names of further modules begin; only those get their dots back.

    Raises:
        ValueError: a flattened name stands for two of them.
    """
    found: dict[str, str] = {}
    for name in names:
        other = found.setdefault(name.replace(".", "_"), name)
        if other != name and name.replace(".", "_") in adapter:
            raise ValueError(f"{name.replace('.', '_')} may mean {other} or {name}")
    starts = {prefix.replace(".", "_"): prefix for prefix in prefixes}

    def name_of(flat: str) -> str:
        start = next((start for start in starts if flat.startswith(start)), "")
        return found.get(flat, starts.get(start, "") + flat.removeprefix(start))

    return {name_of(flat): factors for flat, factors in adapter.items()}


def _read_module(name: str, parts: dict[str, TensorInfo]) -> Factors:
    if not name.startswith(PREFIX):
        raise ValueError(
            f"names of modules begin with {PREFIX!r} in language models; lora_unet_, lora_te_ are diffusion"
        )
    if "dora_scale" in parts:
        raise ValueError("weight-decomposed (dora_scale): not a delta of the weight alone")
    if {"lokr_t1", "lokr_t2"} & parts.keys():
        raise ValueError("a Tucker core (lokr_t1, lokr_t2) belongs to a convolution, not to a linear layer")
    ranks = {parts[key].shape[-1] for key in ("lokr_w1_a", "lokr_w2_a") if key in parts}
    alpha = parts.pop("alpha", None)
    left, right = (read_matrix(parts, which) for which in ("lokr_w1", "lokr_w2"))
    if parts:
        raise ValueError(f"unknown tensors {', '.join(sorted(parts))}")
    if ranks:  # two whole factors have no scale
        value = _read_alpha(alpha)
        if ranks != {value}:
            raise ValueError(
                f"alpha is {value:g}, the rank {', '.join(map(str, sorted(ranks)))}: LyCORIS's training, merging and "
                "bypass modes disagree on what a scale other than 1 means; multiply lokr_w1 (or lokr_w1_a) by the "
                "scale that you mean and set alpha to the rank"
            )
    if not bool(left.isfinite().all() and right.isfinite().all()):
        raise ValueError("values are not finite")
    return Factors(left[None], right[None], ones(1))


def _read_alpha(info: TensorInfo | None) -> float:
    if info is None or info.numel != 1:
        raise ValueError(f"alpha is {'missing' if info is None else f'of shape {info.shape}'}, expected one number")
    tensor: Tensor = read_tensor(info)
    return float(tensor.flatten()[0])
