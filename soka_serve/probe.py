"""Statistics of the base model on training batches: weight gradients and second moments of layer inputs.

One decoder layer at a time, so that the peak above the model is one layer's gradients or moments, not the model's.
The price is a pass over the batches per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from soka_serve.collate import IGNORED
from soka_serve.errors import CheckpointError
from soka_serve.weighting import InputMoments

if TYPE_CHECKING:
    from soka_serve.targets import Target

Batch = Mapping[str, torch.Tensor]

DEFAULT_GRADIENT_BATCHES = 8


def batches_needed(targets: Sequence[Target]) -> int:
    """How many batches the rules of these targets ask for."""
    return max((_batches_of(t) for t in targets), default=0)


def _batches_of(target: Target) -> int:
    asked = target.rule.calibration_batches
    return asked or (DEFAULT_GRADIENT_BATCHES if target.rule.init == "gradient" else 0)


def gather(
    model: nn.Module, batches: Sequence[Batch], targets: Sequence[Target]
) -> Iterator[tuple[Target, torch.Tensor | None, InputMoments | None]]:
    """For each target: the gradient (out, in) of the loss in float32, or the moments of its inputs.

    Semantics: loss = mean over all trained tokens of the asked batches; moments = X^T X over all tokens, padding left
    out.

    Args:
        model: the base, in evaluation mode, its parameters frozen; left as it was found.
        batches: input_ids, labels and attention_mask (batch, tokens), on the model's device.
        targets: those whose rule needs them. `init = "gradient"` gives the gradient; any other init with
            `calibration_batches` gives moments.

    Yields:
        (target, gradient or None, moments or None), grouped by decoder layer.

    Raises:
        CheckpointError: a gradient or an input that is not finite.
    """
    ordered = sorted(targets, key=lambda t: (-1 if t.module.layer is None else t.module.layer, t.module.name))
    for _, group in groupby(ordered, key=lambda t: t.module.layer):
        yield from _gather_layer(model, batches, list(group))


def _gather_layer(
    model: nn.Module, batches: Sequence[Batch], group: list[Target]
) -> Iterator[tuple[Target, torch.Tensor | None, InputMoments | None]]:
    layers = {t.module.name: model.get_submodule(t.module.name) for t in group}
    wants_gradient = [t for t in group if t.rule.init == "gradient"]
    wants_moments = [t for t in group if t.rule.init != "gradient"]
    moments = {t.module.name: InputMoments(t.module.in_features) for t in wants_moments}
    inputs: dict[str, torch.Tensor] = {}

    def make_hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            inputs[name] = arguments[0].detach()

        return hook

    # Per target, how many trained tokens its batches have: the loss of a batch is a mean over its own.
    trained = [_trained_tokens(batch) for batch in batches]
    totals = {t.module.name: sum(trained[: _batches_of(t)]) for t in wants_gradient}
    weights = {t.module.name: cast(nn.Parameter, layers[t.module.name].weight) for t in wants_gradient}
    gradients = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    handles = [layers[n].register_forward_pre_hook(make_hook(n)) for n in moments]
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for index, batch in enumerate(batches):
            counting = [t for t in wants_gradient if index < _batches_of(t)]
            with torch.set_grad_enabled(bool(counting)):
                output = model(**batch)
            for name in [t.module.name for t in wants_moments if index < _batches_of(t)]:
                try:
                    moments[name].accumulate(inputs[name][batch["attention_mask"].bool()])
                except ValueError:
                    raise _not_finite(name, "inputs") from None
            inputs.clear()
            if not counting or not trained[index]:
                continue
            output.loss.backward()
            for name in [t.module.name for t in counting]:
                found = weights[name].grad
                assert found is not None  # every adapted projection lies on the loss's path
                gradients[name].add_(found.float(), alpha=trained[index] / totals[name])
            for weight in weights.values():
                weight.grad = None
    finally:
        for handle in handles:
            handle.remove()
        for weight in weights.values():
            weight.requires_grad_(False)
            weight.grad = None
    for target in group:
        name = target.module.name
        if name in gradients and not bool(gradients[name].isfinite().all()):
            raise _not_finite(name, "gradient")
        yield target, gradients.pop(name, None), moments.pop(name, None)


def _not_finite(name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: its {what} on the training data hold NaN or infinity",
        hint="The base's weights may hold some; a base in float16 may overflow where bfloat16 does not.",
    )


def _trained_tokens(batch: Batch) -> int:
    """Tokens that the loss is taken over: a row's first label has nothing before it to be predicted from."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())
