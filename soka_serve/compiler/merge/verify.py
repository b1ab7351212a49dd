"""Checks of a merged model against base + adapter that share no arithmetic and no layout with the merge itself."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from soka_serve.adapter.format import Adapter
from soka_serve.base.base import Base
from soka_serve.base.checkpoint import Checkpoint
from soka_serve.base.held import held_modules, held_weight
from soka_serve.base.weight_map import WeightMap
from soka_serve.errors import BuildError, CheckpointError, name_some
from soka_serve.io.safetensors import TensorInfo, read_header, read_tensor

if TYPE_CHECKING:
    from soka_serve.base.model import Quantize

log = logging.getLogger(__name__)

_SAMPLED_TENSORS = 8
_SAMPLED_ROWS = 16
# Rounding once is half a unit in the last place; a float64 sum is no wider than what is written.
_MAX_ULP = {torch.bfloat16: 1.01, torch.float16: 1.01, torch.float32: 1.01, torch.float64: 1e4}
# Log-probabilities (nats) of two models whose weights agree but for the odd last place.
_MAX_NATS = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
_PROBE = (2, 16)  # sequences, tokens
_HINT = "this is a bug in soka-serve, or the disk is failing: merge again, and report it if it stays"


def _spread(count: int, most: int) -> list[int]:
    """Up to `most` indices out of `count`, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def verify_tensors(
    directory: Path, original: Base, adapters: Sequence[tuple[Adapter, float]], held: Mapping[str, Quantize]
) -> float:
    """Read a sample of the written weights back and hold it against base + delta in float64.

    Up to 8 adapted tensors, 16 rows of each; 8 others, whose rows must not have changed. The safetensors library must
    find them in the files, and the delta's rows come from numpy.kron.

    Args:
        directory: the merged model.
        original: its base.
        adapters: with their weights.
        held: by tensor name, the bits that the base computes with in its place.

    Returns:
        The largest error, in units of the last place of the written dtype.

    Raises:
        BuildError: names the tensor and its error.
    """
    checkpoint = original.checkpoint
    deltas: dict[str, list[tuple[Adapter, str, float]]] = {}
    for adapter, weight in adapters:
        for module in adapter.factors:
            deltas.setdefault(original.weights.get(module).name, []).append((adapter, module, weight))
    others = [n for n, t in checkpoint.tensors.items() if n not in deltas and t.shape]
    worst, damaged = 0.0, list[str]()
    sample = partial(_sample, directory, checkpoint, held)
    for name, row, got, base in sample(list(deltas)):
        exact = base[0].double()
        want = exact + torch.from_numpy(sum(w * _delta_row(a, m, row) for a, m, w in deltas[name]))
        worst = max(worst, _check_row(name, row, got[0], want, exact))
    for name, row, got, base in sample(others):
        if not _is_kept(got, base):
            raise BuildError(f"verify: {name}, row {row}: not adapted, yet changed by the merge", hint=_HINT)
        if base.is_floating_point() and not bool(torch.isfinite(base.float()).all()) and name not in damaged:
            damaged.append(name)
    if damaged:
        where = checkpoint.directory, name_some(damaged)
        log.warning("the base %s holds NaN or infinity in %s; copied as it is", *where)
    log.info("verify: sampled weights are within %.2f ulp of base + delta", worst)
    return worst


def _sample(
    directory: Path, checkpoint: Checkpoint, held: Mapping[str, Quantize], names: Sequence[str]
) -> Iterator[tuple[str, int, Tensor, Tensor]]:
    """Some rows of some tensors: name, index, the row as written and as the base computes with it, (1, ...) each."""
    for name in [names[i] for i in _spread(len(names), _SAMPLED_TENSORS)]:
        info, written = checkpoint.info(name), _written(directory, checkpoint.info(name))
        whole = held_weight(read_tensor(info), held[name]) if name in held else None
        for row in _spread(info.shape[0], _SAMPLED_ROWS):
            got = read_tensor(written, slice(row, row + 1))
            yield name, row, got, read_tensor(info, slice(row, row + 1)) if whole is None else whole[row : row + 1]


def _is_kept(got: Tensor, base: Tensor) -> bool:
    """Whether values are the base's: bit for bit, so that NaN is NaN, unless the dtype was changed."""
    if got.dtype == base.dtype:
        return torch.equal(got.contiguous().view(torch.uint8), base.contiguous().view(torch.uint8))
    return torch.equal(got, base.to(got.dtype))


def _written(directory: Path, info: TensorInfo) -> TensorInfo:
    """Where a tensor lies in a merged file. The library maps files, and the kernel then reads MiBs for every row."""
    file = directory / info.file.name
    try:
        written = read_header(file)[info.name]
        with safe_open(file, framework="pt") as opened:
            part = opened.get_slice(info.name)
            found = part.get_dtype(), tuple(part.get_shape())
    except (CheckpointError, KeyError, SafetensorError) as error:
        raise BuildError(f"verify: {info.name} cannot be read back: {error}", hint=_HINT) from error
    if found != (written.dtype, info.shape):
        raise BuildError(f"verify: {info.name}: expected {(written.dtype, info.shape)}, found {found}", hint=_HINT)
    return written


def _delta_row(adapter: Adapter, module: str, row: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """One row of the delta in float64: the sum of sigma * kron(left[i], right[a]) with row = i*p + a."""
    sets = [(adapter.factors[module], 1.0)]
    if module in adapter.initial:
        sets.append((adapter.initial[module], -1.0))
    total = np.zeros(sets[0][0].shape.in_features)
    for factors, sign in sets:
        i, a = divmod(row, factors.shape.p)
        left, right = factors.left[:, i].double().numpy(), factors.right[:, a].double().numpy()
        for k, sigma in enumerate(factors.sigma.double().tolist()):
            total += sign * sigma * np.kron(left[k], right[k])
    return total


def _check_row(name: str, row: int, got: Tensor, want: Tensor, base: Tensor) -> float:
    info = torch.finfo(got.dtype)
    size = torch.maximum(want.abs(), base.abs()).clamp_min(info.tiny)
    error = float(((got.double() - want).abs() / (info.eps * size)).max())
    if not error <= _MAX_ULP[got.dtype]:
        raise BuildError(f"verify: {name}, row {row}: {error:.2f} ulp of {got.dtype} from base + delta", hint=_HINT)
    return error


@torch.no_grad()
def verify_logits(directory: Path, base: Path, adapter: Adapter) -> float | None:
    """Load the merged model with transformers and compare it with base + adapter through PEFT, both in float32.

    The base of an adapter that adds to one in bits computes with plain weights of those values.

    Returns:
        The largest difference of a log-probability on 2 sequences of 16 arbitrary tokens, nats; in half precision
        that is the rounding of the weights. None where the base's own are NaN or infinite: there is nothing to compare.

    Raises:
        BuildError: the model does not load, or differs from base + adapter with rounded weights.
        CheckpointError: the base can be loaded by code of its own only, which is not run.
    """
    from peft import PeftModel

    import soka_serve.peft  # registers SOKA
    from soka_serve.base.model import quiet_bars
    from soka_serve.base.pretrained import open_model

    def load(path: Path) -> Any:
        with quiet_bars():
            return open_model(path, dtype=torch.float32).eval()

    def answer(model: Any) -> Tensor:
        words, generator = model.config.get_text_config().vocab_size, torch.Generator().manual_seed(0)
        ids = torch.randint(words, _PROBE, generator=generator)
        return torch.log_softmax(model(input_ids=ids).logits.double(), -1)

    quantize = cast("Quantize", adapter.quantize or "none")
    try:
        model = load(base)
    except CheckpointError as refusal:
        raise CheckpointError(
            f"verify: transformers cannot load the base without its own code:\n{refusal.message}",
            hint=f"merge without this check (--no-verify), or: {refusal.hint}",
        ) from refusal
    weights = Base(base).weights
    for name in held_modules(base, quantize):
        model.get_submodule(name).weight.copy_(held_weight(weights.read(name), quantize))
    alone = answer(model)
    if not bool(torch.isfinite(alone).all()):
        bad = [name for name, parameter in model.named_parameters() if not bool(torch.isfinite(parameter).all())]
        blamed = f"; NaN or infinite in the base: {name_some(bad)}" if bad else ""
        log.warning("verify: the base %s itself computes NaN or infinity, so logits are not compared%s", base, blamed)
        return None
    if quantize == "none":
        tuned = PeftModel.from_pretrained(model, str(adapter.directory)).eval()
    else:  # which PEFT refuses on plain weights
        deltas = {name: adapter.exact_delta(name) for name in adapter.factors}
        tuned = soka_serve.peft.build_soka_model(model, deltas, initial=False).eval()
    adapted = answer(tuned)
    # The same model with its weights rounded as the merged ones are: what is left is no rounding.
    rounded = tuned.merge_and_unload()
    coarsest = _round_as(rounded, Base(directory).weights)
    expected = answer(rounded)
    del model, tuned, rounded
    gc.collect()
    merged = answer(_load_merged(load, directory))
    error, apart, effect = (float((merged - other).abs().max()) for other in (adapted, expected, alone))
    log.info("verify: log-probabilities within %.1e nats of base + adapter, which is %.1e from the base", error, effect)
    if not apart <= _MAX_NATS[coarsest]:
        raise BuildError(
            f"verify: log-probabilities differ by up to {apart:.3g} nats from base + adapter with {coarsest} weights "
            f"(at most {_MAX_NATS[coarsest]:g} expected)",
            hint=_HINT,
        )
    return error


def _round_as(model: Any, written: WeightMap) -> str:
    """Round a model's parameters to the dtypes of a checkpoint; the coarsest of these, in torch's spelling."""
    coarsest = "float32"
    for name, parameter in model.named_parameters():
        info = written.find_parameter(name)
        dtype = torch.float32 if info is None else info.torch_dtype
        parameter.copy_(parameter.to(dtype))
        coarsest = max(coarsest, str(dtype).removeprefix("torch."), key=lambda d: _MAX_NATS.get(d, 0.0))
    return coarsest


def _load_merged(load: Callable[[Path], Any], directory: Path) -> Any:
    try:
        return load(directory)
    except (OSError, ValueError, RuntimeError) as error:
        raise BuildError(f"verify: transformers cannot load the merged model: {error}", hint=_HINT) from error
