"""Gradients and input moments of a group of modules, collected by hooks while calibration rows are run."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from soka_serve.compiler.init.candidate import TargetStatistics
from soka_serve.data.collate import IGNORED
from soka_serve.errors import CheckpointError
from soka_serve.io.safetensors import check_finite
from soka_serve.kron.decompose import energy_of
from soka_serve.kron.output_weighting import OutputMoments
from soka_serve.kron.weighting import InputMoments

if TYPE_CHECKING:
    from soka_serve.base.target_modules import TargetModule

logger = logging.getLogger(__name__)

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Rows:
    """Rows of equal length of one batch, without padding."""

    batch: int
    inputs: Batch
    trained: Tensor
    """(rows, tokens) bool: the positions whose next token the loss asks for."""

    @property
    def tokens(self) -> int:
        """Tokens that the loss is taken over."""
        return int(self.trained.sum())

    @property
    def weighing(self) -> Tensor:
        """(rows, tokens) bool: the positions whose inputs count as moments.

        Those that are trained, but for a row's first: it is the attention sink, whose hidden states are many times as
        long as all others' and the same in every row (Sun et al., arXiv:2402.17762). eval/bench/calibration.py measures
        what this is worth.
        """
        positions = self.trained.clone()
        positions[:, 0] = False
        return positions


Run = Callable[[int], object]
"""Runs the whole model or one layer, forwards or there and back, on the rows of a number."""


def rows_of(batches: Sequence[Batch]) -> Iterator[Rows]:
    """The rows of batches (batch, tokens), padded at their ends, as rows of equal length."""
    for number, batch in enumerate(batches):
        lengths = batch["attention_mask"].sum(1)
        for length in sorted(set(lengths.tolist())):
            inputs = {key: value[lengths == length, :length] for key, value in batch.items()}
            asked = inputs["labels"] != IGNORED
            asked[:, 0] = False  # a row's first label has nothing before it to be predicted from
            yield Rows(number, inputs, asked.roll(-1, 1))


def collect_gradients(model: nn.Module, rows: Sequence[Rows], group: list[TargetModule], run: Run) -> dict[str, Tensor]:
    """The gradients of a group's weights. `run` gives those of the mean loss of its rows' trained tokens."""
    modules = {t.module.name: model.get_submodule(t.module.name) for t in group}
    sums = {
        name: torch.zeros_like(cast(Tensor, module.weight), dtype=torch.float32) for name, module in modules.items()
    }
    totals = {t.module.name: sum(r.tokens for r in rows if r.batch < t.rule.batches) for t in group}
    shares: dict[str, float] = {}  # of the rows at hand in the trained tokens of a target's batches

    def make_hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor]:
        total = sums[name]

        def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
            x: Tensor = (*arguments, *named.values())[0]

            def add(slope: Tensor) -> None:  # into the sum at once: a weight's own gradient would lie beside it
                if name in shares:
                    above, below = (t.reshape(-1, t.shape[-1]).to(total) for t in (slope, x))
                    total.addmm_(above.t(), below, alpha=shares[name])

            return _with_hook(output, add)

        return hook

    handles = [module.register_forward_hook(make_hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        for at, r in enumerate(rows):
            if r.tokens:
                counting = [t.module.name for t in group if r.batch < t.rule.batches]
                shares = {name: r.tokens / totals[name] for name in counting}
                run(at)
    finally:
        for handle in handles:
            handle.remove()
    for name, total in sums.items():
        if not math.isfinite(energy_of(total)):
            raise _not_finite(model, name, "gradient")
    return sums


def collect_moments(
    model: nn.Module, rows: Sequence[Rows], group: list[TargetModule], run: Run
) -> Iterator[TargetStatistics]:
    """The moments of a group's inputs, each module's over the rows of its own batches.

    With `weighting = "both"` also those of the gradients of its outputs, at the same positions, of the sum of the loss
    over the trained tokens; `run` then goes back, too, for the mean loss of its rows.
    """
    shared = _SharedMoments({t.module.name: t.module.in_features for t in group})
    outputs = {t.module.name: OutputMoments(t.shape) for t in group if t.rule.weighting == "both" and t.shape}
    seen: dict[str, list[Tensor]] = {}  # of the rows at hand, in the order of calls
    wanted: set[str] = set()
    positions, tokens = torch.empty(0), 0  # of the rows at hand

    def make_hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor | None]:
        def add(slope: Tensor) -> None:
            try:
                outputs[name].accumulate(_select(slope, positions) * tokens)
            except ValueError as error:
                raise _not_finite(model, name, "outputs' gradients") from error

        def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor | None:
            if name not in wanted:
                return None
            x: Tensor = (*arguments, *named.values())[0]
            seen.setdefault(name, []).append(x)  # itself: who sees the same tensor shares its moments
            return _with_hook(output, add) if name in outputs else None

        return hook

    handles = [
        model.get_submodule(t.module.name).register_forward_hook(make_hook(t.module.name), with_kwargs=True)
        for t in group
    ]
    try:
        for at, r in enumerate(rows):
            wanted = {t.module.name for t in group if r.batch < t.rule.batches}
            positions, tokens = r.weighing, r.tokens
            if not tokens:
                continue
            run(at)
            for name in shared.add(seen, positions):
                raise _not_finite(model, name, "inputs")
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    for target in group:
        name = target.module.name
        moments = shared.by_name.pop(name, None)
        if moments is None:
            logger.warning(
                "%s: no trained token of the calibration batches reached it; its inputs do not weigh its start", name
            )
        slopes = outputs.pop(name, None)
        yield TargetStatistics(target, moments=moments, outputs=None if moments is None else slopes)


def _with_hook(output: Tensor, add: Callable[[Tensor], None]) -> Tensor:
    """The output, handing its gradient to `add`."""
    if not output.requires_grad:  # the first module of a pass: no weight is trained
        output = output.detach().requires_grad_(True)
    output.register_hook(add)  # type: ignore[no-untyped-call]
    return output


class _SharedMoments:
    """Moments of modules' inputs, one object for all modules that have always seen the same tensors."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        self._widths = widths
        self.by_name: dict[str, InputMoments] = {}

    @torch.no_grad()
    def add(self, seen: Mapping[str, Sequence[Tensor]], positions: Tensor) -> list[str]:
        """Adds what each module saw in one run, tensors (..., in), at some positions (rows, tokens).

        Returns:
            The modules whose inputs are not finite.
        """
        same: dict[tuple[int, ...], list[str]] = {}
        for name, tensors in seen.items():
            same.setdefault(tuple(map(id, tensors)), []).append(name)
        for names in same.values():
            chosen = [_select(x, positions) for x in seen[names[0]]]
            if not any(x.numel() for x in chosen):
                continue
            for moments in {id(m): m for m in map(self.by_name.get, names)}.values():
                members = [name for name in names if self.by_name.get(name) is moments]
                try:
                    self._share(moments, members, chosen)
                except ValueError:
                    return members
        return []

    def _share(self, moments: InputMoments | None, members: list[str], tensors: Sequence[Tensor]) -> None:
        """Adds the same tensors to the moments that these modules, and perhaps others, have had so far."""
        if moments is None:
            moments = InputMoments(self._widths[members[0]])
        elif sum(m is moments for m in self.by_name.values()) > len(members):
            moments = copy.deepcopy(moments)  # the others saw something else this time
        self.by_name.update(dict.fromkeys(members, moments))
        for x in tensors:
            moments.accumulate(x)


def _select(x: Tensor, positions: Tensor) -> Tensor:
    """The inputs (rows, tokens, ...) or (rows * tokens, ...) at some positions; all of those that come otherwise.

    Tokens that were routed to an expert cannot be told apart.
    """
    if x.shape[:2] == positions.shape:
        return x[positions]
    return x[positions.flatten()] if len(x) == positions.numel() else x


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
