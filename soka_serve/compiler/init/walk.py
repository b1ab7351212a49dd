"""The base's decoder layers, run one at a time over calibration rows: one forward pass in all, one backward pass.

A layer's other arguments (masks, position embeddings) do not depend on the hidden states, so a pass in which every
layer returns its input tells them at next to no cost. A layer can then be run by itself on the hidden states of the one
below (as GPTQ's calibration does, arXiv:2210.17323), and so can its backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from soka_serve.base.decoder import NotWalkableError, decoder_layers

_TOLERANCE = 1e-3  # of the norm of the last hidden states; a layer that gets other arguments is off by far more


@dataclass(frozen=True)
class _Call:
    """What a layer gets beside the hidden states."""

    arguments: tuple[Any, ...]
    named: dict[str, Any]


class LayerWalk:
    """Runs the decoder layers of a causal model one by one.

    Args:
        model: a causal model of transformers', in evaluation mode, its parameters frozen.
        rows: input_ids, labels and attention_mask (rows, tokens), rows of equal length without padding.

    Raises:
        NotWalkableError: the model has no list of decoder layers, calls them in another order or with arguments that
            depend on the hidden states, or a walk's result differs from that of a forward pass.
    """

    def __init__(self, model: nn.Module, rows: Sequence[Mapping[str, Tensor]]) -> None:
        self.model, self.rows = model, rows
        self._decoder, self.name, self.layers = decoder_layers(model)
        self._calls: list[list[_Call]] = []  # by rows, then by layer
        self.embedded: list[Tensor] = []
        """By rows, the hidden states (rows, tokens, hidden) that the first layer gets; a pass takes them away."""
        for inputs in rows:
            hidden, calls = self._record(inputs)
            self.embedded.append(hidden)
            self._calls.append(calls)
        self._check(min(range(len(rows)), key=lambda at: rows[at]["input_ids"].numel()))

    def layer_of(self, module: str) -> int | None:
        """The number of the layer that a module of this name lies in; None: in none."""
        number, _, inner = module.removeprefix(f"{self.name}.").partition(".")
        return int(number) if module.startswith(f"{self.name}.") and number.isdecimal() and inner else None

    def run(self, layer: int, at: int, hidden: Tensor) -> Tensor:
        """The hidden states (rows, tokens, hidden) that a layer makes of those of rows number `at`."""
        call = self._calls[at][layer]
        return cast(Tensor, self.layers[layer](hidden, *call.arguments, **call.named))

    def loss_gradient(self, at: int, hidden: Tensor) -> Tensor:
        """The gradient of the mean loss of rows number `at` with respect to the last layer's output `hidden`."""
        last = len(self.layers) - 1
        leaf = hidden.detach().requires_grad_(True)

        def make(layer: int) -> Callable[..., Tensor]:
            return lambda *arguments, **named: leaf if layer == last else _hidden_of(arguments, named)[0]

        with _forwards(self.layers, make), torch.enable_grad():
            self.model(**self.rows[at], use_cache=False).loss.backward()
        return cast(Tensor, leaf.grad)

    @torch.no_grad()
    def _record(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[_Call]]:
        calls: list[_Call] = []
        first: list[Tensor] = []

        def make(layer: int) -> Callable[..., Tensor]:
            def pass_on(*arguments: Any, **named: Any) -> Tensor:
                if layer != len(calls):
                    raise NotWalkableError(f"layer {layer} is called after {len(calls)} others")
                hidden, others, named = _hidden_of(arguments, named)
                first.append(hidden)
                calls.append(_Call(others, named))
                return hidden

            return pass_on

        with _forwards(self.layers, make):
            self._decoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        if len(calls) != len(self.layers):
            raise NotWalkableError(f"{len(calls)} of {len(self.layers)} layers are called")
        return first[0], calls

    @torch.no_grad()
    def _check(self, at: int) -> None:
        """One forward pass over some rows, and beside each layer the walk's own run of it."""
        hidden, expected, walking = self.embedded[at], None, False

        def follow(layer: int) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_: nn.Module, arguments: Any, output: Any) -> None:
                nonlocal hidden, expected, walking
                if walking:
                    return
                walking = True
                hidden, expected = self.run(layer, at, hidden), output
                walking = False
                if not isinstance(hidden, Tensor) or hidden.shape != self.embedded[at].shape:
                    reason = f"layer {layer} returns something else than hidden states of its input's shape"
                    raise NotWalkableError(reason)

            return hook

        handles = [layer.register_forward_hook(follow(number)) for number, layer in enumerate(self.layers)]
        inputs = self.rows[at]
        try:
            self._decoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        if not isinstance(expected, Tensor) or expected.shape != hidden.shape:
            raise NotWalkableError("a forward pass returns hidden states of another shape")
        difference = float((hidden.float() - expected.float()).norm() / expected.float().norm())
        if difference > _TOLERANCE:
            raise NotWalkableError(
                f"its last hidden states differ by {difference:.1g} of their norm from a forward pass's"
            )


def _hidden_of(arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden states among a layer's arguments, and the others."""
    if arguments:
        return arguments[0], arguments[1:], named
    others = {key: value for key, value in named.items() if key != "hidden_states"}
    if len(others) == len(named):
        raise NotWalkableError("a layer gets no `hidden_states`")
    return named["hidden_states"], (), others


@contextmanager
def _forwards(layers: Sequence[nn.Module], make: Callable[[int], Callable[..., Tensor]]) -> Iterator[None]:
    """Replaces every layer's forward by `make(its number)`."""
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for number, layer in enumerate(layers):
            layer.forward = make(number)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = forward
