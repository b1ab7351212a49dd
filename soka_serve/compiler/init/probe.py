"""Statistics of the base model on training batches: weight gradients and second moments of layer inputs.

The decoder layers are walked one by one (see `walk`), so a whole model costs one forward pass over the batches, and
for gradients one backward pass as well. In memory lie the hidden states and one layer's statistics in float32:
gradients of at most five times the largest weight, or moments of at most four of the widest input. A layer that has
more is run again. What was cast or moved of the layer is let go of while its statistics are used.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from soka_serve.base.decoder import NotWalkableError
from soka_serve.compiler.init.candidate import TargetStatistics
from soka_serve.compiler.init.collect import Batch, Rows, Run, collect_gradients, collect_moments, rows_of
from soka_serve.compiler.init.walk import LayerWalk
from soka_serve.io.files import disk_errors

if TYPE_CHECKING:
    from soka_serve.base.target_modules import TargetModule
    from soka_serve.compiler.init.placement import LayerPlacement

logger = logging.getLogger(__name__)

_GRADIENTS_AT_ONCE, _MOMENTS_AT_ONCE = 5, 4  # of the largest weight, of the widest second moment (some share one)


def batches_needed(targets: Sequence[TargetModule]) -> int:
    """How many batches the rules of these targets ask for."""
    return max((t.rule.batches for t in targets), default=0)


def gather(
    model: nn.Module,
    batches: Sequence[Batch],
    targets: Sequence[TargetModule],
    scratch: Path | None = None,
    placement: LayerPlacement | None = None,
) -> Iterator[TargetStatistics]:
    """For each target: the gradient of the loss, or the moments of its inputs and perhaps of its outputs' gradients.

    Semantics: loss = mean over all trained tokens of the asked batches; moments = X^T X over the inputs of the module
    at the trained positions but for a row's first (`Rows.weighing`), each time that it is called. Modules with the same
    inputs (query, key and value; gate and up) share one object of moments.

    Args:
        model: the base, in evaluation mode, its parameters frozen; left as it was found.
        batches: input_ids, labels and attention_mask (batch, tokens), on the model's device, padded at their ends.
        targets: those whose rule needs them. Starts that need the gradient get it; any other with
            `calibration_batches` gets moments, with `weighting = "both"` also those of the outputs.
        scratch: folder where gradients wait for their turn; None: in memory.
        placement: of the model's layers, where they are not all where they are run.

    Yields:
        Layer by layer: moments of inputs alone from the first to the last, what takes a pass back from the last to the
        first. Let go of one before asking for the next. A module that no trained token reached (an
        expert that none was routed to) has a gradient of zero; instead of moments it has None, and a warning.

    Raises:
        CheckpointError: a gradient or an input that is not finite.
    """
    rows = list(rows_of(batches))
    kinds: dict[str, list[TargetModule]] = {"inputs": [], "both": [], "gradient": []}
    for target in targets:
        kinds["gradient" if target.rule.start.needs_gradient else target.rule.weighting].append(target)
    for kind, members in kinds.items():
        if members:
            passes = _Passes.plan(model, rows, members, placement)
            for known in _gather_moments(passes) if kind == "inputs" else _gather_backwards(passes, scratch):
                if placement is not None:
                    placement.put_back()
                yield known
                del known


@dataclass(frozen=True)
class _Passes:
    """What is run, and whose statistics each run gathers."""

    model: nn.Module
    rows: Sequence[Rows]
    walk: LayerWalk | None
    """None: each pass runs the whole model."""
    outside: list[list[TargetModule]]
    """Groups of targets that are in no layer of the walk."""
    by_layer: dict[int, list[list[TargetModule]]]

    @classmethod
    def plan(
        cls, model: nn.Module, rows: Sequence[Rows], targets: Sequence[TargetModule], placement: LayerPlacement | None
    ) -> _Passes:
        batches = batches_needed(targets)
        rows = [r for r in rows if r.batch < batches]
        walk = None
        try:
            walk = LayerWalk(model, [r.inputs for r in rows])
        except NotWalkableError as reason:
            logger.warning("the base's layers cannot be run one by one: %s. Each group takes a whole pass.", reason)
        members: dict[int | None, list[TargetModule]] = {}
        for target in targets:
            members.setdefault(walk.layer_of(target.module.name) if walk else None, []).append(target)
        at_once = _GRADIENTS_AT_ONCE if targets[0].rule.start.needs_gradient else _MOMENTS_AT_ONCE
        most = at_once * max(map(_values, targets))
        outside = split_targets(members.pop(None, []), most)
        if outside and placement is not None:
            placement.place_all()
        by_layer = {layer: split_targets(group, most) for layer, group in members.items() if layer is not None}
        return cls(model, rows, walk, outside, by_layer)


def split_targets(targets: Sequence[TargetModule], most: int) -> list[list[TargetModule]]:
    """Groups of targets whose statistics have at most so many values together, or of one target that has more."""
    groups: list[list[TargetModule]] = []
    for target in sorted(targets, key=lambda t: (-_values(t), t.module.name)):  # first fit, the largest first
        group = next((g for g in groups if sum(map(_values, g)) + _values(target) <= most), None)
        if group is None:
            groups.append([target])
        else:
            group.append(target)
    return groups


def _values(target: TargetModule) -> int:
    """Values of a target's statistics."""
    module = target.module
    return module.in_features * (module.out_features if target.rule.start.needs_gradient else module.in_features)


def _gather_moments(passes: _Passes) -> Iterator[TargetStatistics]:
    """Moments, from the first layer to the last."""
    model, rows, walk = passes.model, passes.rows, passes.walk
    for group in passes.outside:
        yield from collect_moments(model, rows, group, lambda at: model(**rows[at].inputs))
    if walk is None or not passes.by_layer:
        return
    hidden, walk.embedded = walk.embedded, []
    for layer in range(max(passes.by_layer) + 1):
        above: dict[int, Tensor] = {}
        run = _forwards(walk, layer, hidden, above)
        for group in passes.by_layer.get(layer, []):
            yield from collect_moments(model, rows, group, run)
        for at in range(len(rows)):
            if at not in above:
                run(at)
        hidden = [above[at] for at in range(len(rows))]


def _forwards(walk: LayerWalk, layer: int, hidden: Sequence[Tensor], above: dict[int, Tensor]) -> Run:
    """Runs a layer on its rows' hidden states; keeps the results in `above`."""

    @torch.no_grad()
    def run(at: int) -> None:
        above[at] = walk.run(layer, at, hidden[at])

    return run


def _gather_backwards(passes: _Passes, scratch: Path | None) -> Iterator[TargetStatistics]:
    """Gradients, or moments with those of outputs, from the last layer to the first that has targets."""
    model, rows, walk = passes.model, passes.rows, passes.walk

    def collect(group: list[TargetModule], run: Run) -> Iterator[TargetStatistics]:
        if group[0].rule.start.needs_gradient:
            return _stored(collect_gradients(model, rows, group, run), group, scratch)
        return collect_moments(model, rows, group, run)

    def whole(at: int) -> None:
        with torch.enable_grad():
            model(**rows[at].inputs).loss.backward()

    for group in passes.outside:
        yield from collect(group, whole)
    if walk is None or not passes.by_layer:
        return
    first = min(passes.by_layer)
    inputs: dict[int, list[Tensor]] = {}  # by layer, of each rows, its hidden states
    hidden, walk.embedded = walk.embedded, []
    for layer in range(len(walk.layers)):
        if layer >= first:
            inputs[layer] = hidden
        above: dict[int, Tensor] = {}
        run = _forwards(walk, layer, hidden, above)
        for at in range(len(rows)):
            run(at)
        hidden = [above[at] for at in range(len(rows))]
    slopes = [
        walk.loss_gradient(at, hidden[at]) if r.tokens else torch.zeros_like(hidden[at]) for at, r in enumerate(rows)
    ]
    for layer in range(len(walk.layers) - 1, first - 1, -1):
        below: dict[int, Tensor] = {}
        back = _backwards(walk, layer, inputs.pop(layer), slopes, below)
        for group in passes.by_layer.get(layer, []):
            yield from collect(group, back)
        for at, r in enumerate(rows):
            if r.tokens and at not in below and layer > first:
                back(at)
        slopes = [below.get(at, slope) for at, slope in enumerate(slopes)]


def _backwards(
    walk: LayerWalk, layer: int, inputs: Sequence[Tensor], slopes: Sequence[Tensor], below: dict[int, Tensor]
) -> Run:
    """Runs a layer there and back, given the loss's gradient by its output; keeps that by its input in `below`."""

    def run(at: int) -> None:
        leaf = inputs[at].detach().requires_grad_(True)
        with torch.enable_grad():
            walk.run(layer, at, leaf).backward(slopes[at])  # type: ignore[no-untyped-call]
        below[at] = cast(Tensor, leaf.grad)

    return run


def _stored(
    gradients: dict[str, Tensor], group: list[TargetModule], scratch: Path | None
) -> Iterator[TargetStatistics]:
    """The gradients of a group one by one, read from a file in `scratch` so that the others take no memory."""
    file = scratch / "gradients.safetensors" if scratch is not None else None
    if file is not None:
        with disk_errors(file):
            save_file(gradients, file)
        gradients.clear()
    for target in group:
        name = target.module.name
        yield TargetStatistics(target, gradients.pop(name) if file is None else _read(file, name))
    if file is not None:
        file.unlink()


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        return cast(Tensor, tensors.get_tensor(name)).clone()  # not a view of the mapped file
