"""Statistics of the base model on training batches: weight gradients and second moments of layer inputs.

A few modules of one decoder layer at a time, so that the peak above the model is theirs, not the model's: gradients
of at most twice the largest weight, or moments of at most the widest input. The price is passes over the batches:
three a layer for gradients at LLaMA's shapes, two for moments.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from soka_serve.data.collate import IGNORED
from soka_serve.errors import CheckpointError
from soka_serve.io.files import disk_errors
from soka_serve.io.safetensors import check_finite
from soka_serve.kron.decompose import energy_of
from soka_serve.kron.weighting import InputMoments

if TYPE_CHECKING:
    from soka_serve.base.targets import Target

logger = logging.getLogger(__name__)

Batch = Mapping[str, torch.Tensor]

_ROWS = 256


def batches_needed(targets: Sequence[Target]) -> int:
    """How many batches the rules of these targets ask for."""
    return max((t.rule.batches for t in targets), default=0)


def gather(
    model: nn.Module, batches: Sequence[Batch], targets: Sequence[Target], scratch: Path | None = None
) -> Iterator[tuple[Target, torch.Tensor | None, InputMoments | None]]:
    """For each target: the gradient (out, in) of the loss in float32, or the moments of its inputs.

    Semantics: loss = mean over all trained tokens of the asked batches; moments = X^T X over all inputs of the module,
    each time that it is called, padding left out.

    Args:
        model: the base, in evaluation mode, its parameters frozen; left as it was found.
        batches: input_ids, labels and attention_mask (batch, tokens), on the model's device.
        targets: those whose rule needs them. `init = "gradient"` gives the gradient; any other init with
            `calibration_batches` gives moments.
        scratch: folder where gradients wait for their turn; None: in memory.

    Yields:
        (target, gradient or None, moments or None), by decoder layer. Let go of one before asking for the next. A
        module that no token reached (an expert that none was routed to) has a gradient of zero; instead of moments it
        has None, and a warning.

    Raises:
        CheckpointError: a gradient or an input that is not finite.
    """
    for group in split_targets(targets):
        yield from _gather_group(model, batches, group, scratch)


def split_targets(targets: Sequence[Target]) -> list[list[Target]]:
    """Groups of targets whose statistics are gathered in one pass: of one decoder layer and one kind.

    What a group holds in float32 stays under twice the largest weight (gradients) or the widest input's second moment.
    """

    def kind(target: Target) -> tuple[int, bool]:
        return -1 if target.module.layer is None else target.module.layer, target.rule.init == "gradient"

    def size(target: Target) -> int:
        module = target.module
        return module.in_features * (module.out_features if target.rule.init == "gradient" else module.in_features)

    most = {
        gradient: (2 if gradient else 1) * max((size(t) for t in targets if kind(t)[1] is gradient), default=0)
        for gradient in (False, True)
    }
    groups: list[list[Target]] = []
    for key, members in groupby(sorted(targets, key=lambda t: (kind(t), -size(t), t.module.name)), key=kind):
        layer_groups: list[list[Target]] = []
        for target in members:  # first fit, the largest first
            fits = (g for g in layer_groups if sum(map(size, g)) + size(target) <= most[key[1]])
            group = next(fits, None)
            if group is None:
                layer_groups.append([target])
            else:
                group.append(target)
        groups += layer_groups
    return groups


def _gather_group(
    model: nn.Module, batches: Sequence[Batch], group: list[Target], scratch: Path | None
) -> Iterator[tuple[Target, torch.Tensor | None, InputMoments | None]]:
    batches = batches[: batches_needed(group)]
    if group[0].rule.init == "gradient":
        gradients = _gather_gradients(model, batches, group)
        file = scratch / "gradients.safetensors" if scratch is not None else None
        if file is not None:
            with disk_errors(file):
                save_file(gradients, file)
            gradients.clear()
        for target in group:
            name = target.module.name
            yield target, gradients.pop(name) if file is None else _read(file, name), None
        if file is not None:
            file.unlink()
        return
    moments = _gather_moments(model, batches, group)
    for target in group:
        name = target.module.name
        found = moments.pop(name)
        if not found.tokens:
            logger.warning(
                "%s: no token of the calibration batches reached it; its inputs do not weigh its start", name
            )
        yield target, None, found if found.tokens else None


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as tensors:
        return cast(torch.Tensor, tensors.get_tensor(name)).clone()  # not a view of the mapped file


def _gather_gradients(model: nn.Module, batches: Sequence[Batch], group: list[Target]) -> dict[str, torch.Tensor]:
    weights = {t.module.name: cast(nn.Parameter, model.get_submodule(t.module.name).weight) for t in group}
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    # Per target, how many trained tokens its batches have: the loss of a batch is a mean over its own.
    trained = [_trained_tokens(batch) for batch in batches]
    totals = {t.module.name: sum(trained[: t.rule.batches]) for t in group}
    shares: dict[str, float] = {}  # of the batch at hand; what is not waited for any more is taken out

    def make_adder(name: str) -> Callable[[torch.Tensor], None]:
        def add(weight: torch.Tensor) -> None:  # at once, so that one gradient at a time lies beside the sums
            if name in shares:
                share = shares.pop(name)
                # By pieces: adding another dtype makes a copy in the sum's.
                gradient = cast(torch.Tensor, weight.grad)
                for total, part in zip(torch.split(sums[name], _ROWS), torch.split(gradient, _ROWS), strict=True):
                    total.add_(part, alpha=share)
            weight.grad = None

        return add

    handles = []
    try:
        for name, weight in weights.items():
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(make_adder(name)))  # type: ignore[no-untyped-call]
        for index, batch in enumerate(batches):
            if not trained[index]:
                continue
            counting = [t.module.name for t in group if index < t.rule.batches]
            shares.update({name: trained[index] / totals[name] for name in counting})
            with torch.enable_grad():
                model(**batch).loss.backward()
            shares.clear()  # what is left was not used for this batch, as experts that no token was routed to
    finally:
        for handle in handles:
            handle.remove()
        for weight in weights.values():
            weight.requires_grad_(False)
            weight.grad = None
    for name, total in sums.items():
        if not math.isfinite(energy_of(total)):
            raise _not_finite(model, name, "gradient")
    return sums


@torch.no_grad()
def _gather_moments(model: nn.Module, batches: Sequence[Batch], group: list[Target]) -> dict[str, InputMoments]:
    moments = {t.module.name: InputMoments(t.module.in_features) for t in group}
    wanted: set[str] = set()  # of the batch at hand
    inputs: dict[str, list[torch.Tensor | None]] = {}
    mask = torch.empty(0)

    def make_hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            if name in wanted:
                x: torch.Tensor = (*arguments, *named.values())[0]
                inputs.setdefault(name, []).append(_tokens_of(x.detach(), mask))

        return hook

    def take_inputs() -> set[str]:
        """Adds what was seen to the moments; names where padding could not be told from it, of which nothing is."""
        unclear = set()
        for name, parts in inputs.items():
            tokens = [part for part in parts if part is not None]
            if len(tokens) < len(parts):
                unclear.add(name)
                continue
            try:
                for part in tokens:
                    moments[name].accumulate(part)
            except ValueError:
                raise _not_finite(model, name, "inputs") from None
        inputs.clear()
        return unclear

    handles = [
        model.get_submodule(name).register_forward_pre_hook(make_hook(name), with_kwargs=True) for name in moments
    ]
    try:
        for index, batch in enumerate(batches):
            wanted = {t.module.name for t in group if index < t.rule.batches}
            mask = batch["attention_mask"].bool()
            model(**batch)
            wanted = take_inputs()
            for rows in _without_padding(batch) if wanted else ():
                mask = rows["attention_mask"].bool()
                model(**rows)
                take_inputs()
    finally:
        for handle in handles:
            handle.remove()
    return moments


def _tokens_of(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | None:
    """A layer's inputs (..., in) without padding; None where it cannot be told which they are.

    Args:
        x: (batch, tokens, ..., in), or (batch * tokens, in) in this order; without padding any (..., in).
        mask: (batch, tokens) bool, False for padding.
    """
    if bool(mask.all()):
        return x
    if x.shape[:2] == mask.shape and x.ndim > 2:
        return x[mask.to(x.device)]
    if x.ndim == 2 and len(x) == mask.numel():
        return x[mask.flatten().to(x.device)]
    return None


def _without_padding(batch: Batch) -> Iterator[Batch]:
    """The rows of a batch (batch, tokens), padded at their ends, as batches of rows of equal length."""
    lengths = batch["attention_mask"].sum(1)
    for length in sorted(set(lengths.tolist())):
        rows = lengths == length
        yield {key: value[rows, :length] for key, value in batch.items()}


def _not_finite(model: nn.Module, name: str, what: str) -> CheckpointError:
    """The weight that is to blame, where one is."""
    for weight_name, weight in model.named_parameters():
        try:
            check_finite(weight.detach(), weight_name)
        except CheckpointError as error:
            return error
    return CheckpointError(
        f"{name}: its {what} on the training data hold NaN or infinity",
        hint="The base's weights are finite; a base in float16 may overflow where bfloat16 does not.",
    )


def _trained_tokens(batch: Batch) -> int:
    """Tokens that the loss is taken over: a row's first label has nothing before it to be predicted from."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())
