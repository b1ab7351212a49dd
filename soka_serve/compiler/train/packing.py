"""Whether examples that lie in one row are kept apart: measured on the model at hand, before it is trained.

transformers tells packed examples apart by their positions alone, and layers without attention (convolutions, recurrent
ones) do not look at positions; nor do models that leave them out when they make their masks. Such a model would be
trained on other examples' text without a word. `check_packing` compares short examples in one row

- with the same row in which the other example's tokens were replaced: nothing may change. The same shapes go through
  the same kernels, so this is exact to rounding in every dtype;
- with each alone, which also finds positions that do not start again.

The first example of a row has nothing before it: what changes there is the noise that the second one's is held against.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.masking_utils import create_masks_for_generate

from soka_serve.data.encode import EncodedExample, PackedRow, pack_examples
from soka_serve.errors import PlanError

if TYPE_CHECKING:
    from soka_serve.data.collate import PadCollator

logger = logging.getLogger(__name__)

Forward = Callable[[Mapping[str, Tensor]], Tensor]

_TOKENS = 64  # of each example; layers that mix examples do so at their border
_NOISE = 10  # times what is seen where nothing can leak
# Nats, for full and for half precision: below it is rounding, whatever the noise was.
_CHANGED = {False: 1e-5, True: 1e-4}
_ALONE = {False: 1e-3, True: 0.5}
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
_LAYER_CHANGED = 1e-3  # of the largest value in a layer's output


@dataclass(frozen=True)
class _Pair:
    """Two examples, and the three rows that are compared: both, and both with the tokens of one of them replaced."""

    first: EncodedExample
    second: EncodedExample

    @property
    def spans(self) -> tuple[slice, slice]:
        """Where the two lie in a row."""
        middle, end = len(self.first.input_ids), len(self.first.input_ids) + len(self.second.input_ids)
        return slice(0, middle), slice(middle, end)

    def rows(self) -> list[PackedRow]:
        tokens = sorted({*self.first.input_ids, *self.second.input_ids})
        others = dict(zip(tokens, tokens[1:] + tokens[:1], strict=True))

        def replaced(example: EncodedExample) -> EncodedExample:
            return EncodedExample([others[token] for token in example.input_ids], example.labels)

        pairs = ([self.first, self.second], [replaced(self.first), self.second], [self.first, replaced(self.second)])
        return [pack_examples(pair, self.spans[1].stop)[0] for pair in pairs]


def check_packing(
    model: nn.Module, rows: Sequence[PackedRow], collate: PadCollator, forward: Forward, *, half: bool, together: bool
) -> None:
    """Refuse to train where the examples of a row see each other.

    A model with attention only that makes its masks without looking at positions is given masks, from here on.

    Args:
        model: in evaluation mode, adapted or not, without wrappers around it.
        rows: what it is to be trained on; the first that holds two examples is used, cut to 64 tokens each.
        collate: makes batches of rows.
        forward: logits (batch, tokens, vocabulary) of a batch, as training computes them; may be collective.
        half: some of it is computed in half precision.
        together: rows share a batch, as they do in training where its batch size is above 1.

    Raises:
        PlanError: names the layer that mixes them.
    """
    pair = _find_pair(rows)
    if pair is None:
        return  # each row holds one example: there is nothing to mix
    problem = _compare(pair, collate, forward, half, together)
    if problem is None:
        return
    handle = _give_masks(model)
    if handle is not None:
        try:
            still = _compare(pair, collate, forward, half, together)
        except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError) as error:
            still = f"{type(error).__name__}: {error}"  # it takes no masks
        if still is None:
            logger.info("packing: this model does not make masks from positions; it is given them")
            return
        handle.remove()
        logger.info("packing: given masks: %s", still)
    layer = _find_layer(model, pair, collate, forward, together)
    raise PlanError(
        f"train.packing: {layer} do not keep the examples of a row apart: {problem}", hint="set train.packing = false"
    )


def _find_pair(rows: Sequence[PackedRow]) -> _Pair | None:
    for row in rows:
        starts = [index for index, position in enumerate(row.position_ids) if position == 0]
        spans = [slice(a, min(b, a + _TOKENS)) for a, b in pairwise([*starts, len(row.position_ids)])]
        parts = [EncodedExample(row.input_ids[span], row.labels[span]) for span in spans[:2]]
        if len(parts) == 2 and len({*parts[0].input_ids, *parts[1].input_ids}) > 1:
            return _Pair(*parts)
    return None


def _compare(pair: _Pair, collate: PadCollator, forward: Forward, half: bool, together: bool) -> str | None:
    """What is wrong, in words, with the rows of a pair; None where nothing is."""
    first, second = pair.spans
    plain, before, after = _forward_rows(pair, collate, forward, together)
    noise, changed = _distance(plain[first], after[first]), _distance(plain[second], before[second])
    if changed > max(_CHANGED[half], _NOISE * noise):
        return f"log-probabilities change by up to {changed:.1e} nats with the tokens of another example"
    alone = [forward(collate([example]))[0] for example in (pair.first, pair.second)]
    noise, changed = _distance(plain[first], alone[0]), _distance(plain[second], alone[1])
    if changed > max(_ALONE[half], _NOISE * noise):
        return f"log-probabilities differ by up to {changed:.1e} nats from those of the same example alone"
    return None


def _forward_rows(pair: _Pair, collate: PadCollator, forward: Forward, together: bool) -> list[Tensor]:
    """Logits (tokens, vocabulary) of each row."""
    rows = pair.rows()
    if together:
        return list(forward(collate(rows)))
    return [forward(collate([row]))[0] for row in rows]


def _distance(one: Tensor, other: Tensor) -> float:
    """The largest expected difference of log-probabilities at a token; logits (tokens, vocabulary), padded or not."""
    length = min(len(one), len(other))
    first, second = (logits[:length].float().log_softmax(-1) for logits in (one, other))
    return float((first.exp() * (first - second).abs()).sum(-1).max())


def _give_masks(model: nn.Module) -> RemovableHandle | None:
    """Have the decoder get its masks made from positions; None for models that have other layers than attention."""
    whole: Any = model
    decoder = (whole.get_base_model() if hasattr(whole, "get_base_model") else whole).base_model
    if not set(getattr(decoder.config.get_text_config(), "layer_types", None) or _ATTENTION) <= _ATTENTION:
        return None

    def add_masks(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        positions = named.get("position_ids")
        if positions is None or named.get("attention_mask") is not None:
            return args, named
        weight = decoder.get_input_embeddings().weight
        # Of the embeddings only shape, dtype and device are looked at.
        blank = torch.empty(*positions.shape, 0, dtype=weight.dtype, device=positions.device)
        masks = create_masks_for_generate(decoder.config, blank, None, None, position_ids=positions)
        return args, {**named, "attention_mask": masks}

    handle: RemovableHandle = decoder.register_forward_pre_hook(add_masks, with_kwargs=True)
    return handle


# ------------------------------------------------------------------------------------------------ which layer it is


def _find_layer(model: nn.Module, pair: _Pair, collate: PadCollator, forward: Forward, together: bool) -> str:
    """The first part of a decoder layer whose output changes with the other example's tokens, and its kind."""
    outputs: dict[str, list[Tensor]] = {}
    kinds = {name: kind for name, kind, _ in _parts_of_layers(model)}
    with _recorded(model, outputs):
        _forward_rows(pair, collate, forward, together)
    first, second = pair.spans
    for name, rows in outputs.items():  # in the order of computation
        plain, before, after = rows
        changed = (plain[second] - before[second]).abs().max()
        noise = (plain[first] - after[first]).abs().max()
        if float(changed) > max(_NOISE * float(noise), _LAYER_CHANGED * float(plain.abs().max())):
            return f"layers such as {name} ({kinds[name]})"
    return f"the layers of {type(model).__name__}"


@contextmanager
def _recorded(model: nn.Module, outputs: dict[str, list[Tensor]]) -> Iterator[None]:
    """While this is active, the outputs (tokens, ...) of each row are collected, by name, in float32 on the CPU."""

    def make_hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, Tensor) and tensor.ndim == 3:
                outputs.setdefault(name, []).extend(tensor.detach().float().cpu())

        return hook

    with ExitStack() as stack:
        for name, _, part in _parts_of_layers(model):
            stack.callback(part.register_forward_hook(make_hook(name)).remove)
        yield


def _parts_of_layers(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Name, kind and module of what decoder layers are made of: attention, convolution, MLP, norms."""
    config: Any = getattr(model, "config", None)
    types = getattr(config.get_text_config(), "layer_types", None) if hasattr(config, "get_text_config") else None
    seen: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or name.startswith(tuple(seen)):
            continue
        seen.append(f"{name}.")  # lists inside its layers, such as experts, are parts of parts
        for index, layer in enumerate(module):
            kind = f", {types[index]}" if types and len(types) == len(module) else ""
            for child, part in layer.named_children():
                full = f"{name}.{index}.{child}".removeprefix("base_model.model.")
                yield full, f"{type(part).__name__}{kind}", part
