"""Effective ranks and nuclear norms: of hidden states, base and adapted, and of the first gradients.

The matrix nuclear norm of hidden states: arXiv:2410.10672, exact here and not approximated by column norms; rows
centred and of norm 1 as in arXiv:2401.17139. Spectra of layer-wise gradients as a check of the data: arXiv:2504.10766
(data of higher quality goes with lower nuclear norms and higher effective ranks).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from soka_serve.compiler.artefact import first_batches, gpu, load_base_of, load_result
from soka_serve.manifest.rules import Adapt

if TYPE_CHECKING:
    from soka_serve.compiler.context import Context
    from soka_serve.data.encode import EncodedSet

_BATCHES = 4
_TOKENS = 1024  # at most so many hidden states are kept of each layer


def measure_spectra(context: Context, new: Path, training: EncodedSet) -> dict[str, Any]:
    """By 'hidden' for 'base' and 'adapted' the layers' spectra, from the embedding's output to the last layer's; by
    'gradients' rows of module, layer and spectrum.

    A spectrum is `describe`'s; the nuclear norm of hidden states is over their Frobenius norm, that of gradients is
    as it is. `tokens` is how many hidden states were looked at, which bounds their effective rank.
    """
    from soka_serve.base.cpu import fast_products

    with fast_products():
        gradients = _gradients(context, training)
        model = load_base_of(context).eval()
        batches = first_batches(context, training, _BATCHES, next(model.parameters()).device)
        states = hidden_states(model, batches)
        tokens = len(states[0])
        hidden = {"base": [describe(unit_rows(layer)) for layer in states]}
        del states
        adapted = load_result(model, new).eval()
        hidden["adapted"] = [describe(unit_rows(layer)) for layer in hidden_states(adapted, batches)]
    for layer in (layer for layers in hidden.values() for layer in layers):
        layer["nuclear_norm"] /= math.sqrt(tokens)
    return {"batches": len(batches), "tokens": tokens, "hidden": hidden, "gradients": gradients}


def describe(matrix: Tensor) -> dict[str, float]:
    """Of a matrix's singular values their sum, and exp of the entropy of their shares of it; computed in float64.

    `nuclear_norm` = sum of sigma; `effective_rank` = exp(-sum of p log p) with p = sigma / sum of sigma, from 1 to the
    rank (Roy and Vetterli 2007); 0 for a matrix of zeros.

    >>> describe(torch.eye(4))
    {'effective_rank': 4.0, 'nuclear_norm': 4.0}
    """
    wide = matrix.double()
    gram = wide @ wide.t() if wide.shape[0] <= wide.shape[1] else wide.t() @ wide
    sigma = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    total = float(sigma.sum())
    shares = sigma[sigma > 0] / total if total else sigma[:0]
    rank = math.exp(-float((shares * shares.log()).sum())) if total else 0.0
    return {"effective_rank": round(rank, 10), "nuclear_norm": total}


def unit_rows(states: Tensor) -> Tensor:
    """Hidden states (tokens, hidden) minus their mean, each then of norm 1; float64."""
    centred = states.double() - states.double().mean(0)
    rows: Tensor = centred / centred.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return rows


@torch.no_grad()
def hidden_states(model: Any, batches: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """Hidden states (tokens, hidden) at the first positions that are no padding: the embedding's, then each layer's."""
    found: list[list[Tensor]] = []
    left = _TOKENS
    for batch in batches:
        mask = batch["attention_mask"].bool()
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        layers = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
        found = found or [[] for _ in layers]
        for kept, layer in zip(found, layers, strict=True):
            kept.append(layer[mask][:left].float())
        left -= len(found[0][-1])
        if left <= 0:
            break
    return [torch.cat(kept) for kept in found]


def _gradients(context: Context, training: EncodedSet) -> list[dict[str, Any]]:
    """Spectra of the gradient of the base's mean loss by each adapted weight."""
    from soka_serve.compiler.init.placement import load_layered
    from soka_serve.compiler.init.probe import gather

    device = gpu() or torch.device("cpu")
    rule = Adapt(init="gradient", calibration_batches=_BATCHES)
    targets = [replace(target, rule=rule) for target in context.targets]
    model, placement = load_layered(context.base, context.loaded.manifest.base.dtype, device)
    batches = first_batches(context, training, _BATCHES, device)
    rows = {}
    for known in gather(model, batches, targets, placement=placement):
        assert known.gradient is not None
        rows[known.target.module.name] = describe(known.gradient)
    modules = [target.module for target in context.targets]
    return [{"module": module.name, "layer": module.layer, **rows[module.name]} for module in modules]
