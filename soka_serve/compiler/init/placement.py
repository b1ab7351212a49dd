"""A base for a walk of its layers: weights stay in the checkpoint's mapped files until their layer is run.

On the CPU a model of transformers' holds views of mapped files where its dtype is the stored one, which take no memory
of their own. Brought to another dtype or device, a whole model would: so one layer at a time is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from soka_serve.base.decoder import NotWalkableError, decoder_layers
from soka_serve.base.model import Dtype, held_dtype, load_base
from soka_serve.io.safetensors import DTYPES

if TYPE_CHECKING:
    from soka_serve.base.base import Base

# Of models that keep some parameters in float32 when the others are cast while they are read.
_EXCEPTIONS = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")


class LayerPlacement:
    """Brings the weights of the layer that is run to a dtype and a device, and puts those of the one before back.

    What lies outside the layers is brought there at once, but for an output head with a weight of its own, which counts
    as a layer.

    Args:
        model: as it was loaded, its parameters frozen. Its layers' `forward` is replaced.
        dtype: of the parameters.
        device: of parameters and buffers.

    Raises:
        NotWalkableError: the model has no list of decoder layers.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._stored: dict[nn.Parameter, Tensor] = {}
        parts = list(decoder_layers(model)[2])
        head = cast(Any, model).get_output_embeddings()
        shared = cast(Any, model).get_input_embeddings().weight
        if head is not None and head.weight is not shared:
            parts.append(head)
        self._parts = parts
        inside = {p for part in parts for p in part.parameters()}
        self._bring([p for p in model.parameters() if p not in inside])
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
        for part in parts:
            part.forward = self._placing(part, part.forward)

    def place_all(self) -> None:
        """Bring every layer, to stay: a pass back through the whole model needs them together."""
        for part in self._parts:
            self._bring(list(part.parameters()))
        self._stored.clear()
        self._parts = []

    def put_back(self) -> None:
        """Let go of the layer that was run last, until it is run again: a decomposition has its memory meanwhile."""
        for parameter, stored in self._stored.items():
            parameter.data = stored
        self._stored = {}

    def _placing(self, part: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        mine = list(part.parameters())

        def run(*arguments: Any, **named: Any) -> Any:
            if self._parts and mine[0] not in self._stored:
                self.put_back()
                self._stored = {parameter: parameter.data for parameter in mine}
                self._bring(mine)
            return forward(*arguments, **named)

        return run

    def _bring(self, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            floating = parameter.is_floating_point()
            parameter.data = parameter.data.to(self._device, self._dtype if floating else None)


def load_layered(base: Base, dtype: Dtype, device: torch.device) -> tuple[nn.Module, LayerPlacement | None]:
    """A base with frozen parameters, as `load_base` gives it; its layers are brought to dtype and device when run.

    Returns:
        The model, and what places its layers; None where nothing needs to be brought anywhere, or where the whole model
        was: without a list of layers, or where a cast after reading is not sure to be one while reading.

    Raises:
        CheckpointError, BuildError: as `load_base`.
    """
    dtypes = {info.dtype for info in base.checkpoint.tensors.values()}
    stored = DTYPES[dtypes.pop()][1] if len(dtypes) == 1 else dtype
    model = load_base(base.directory, dtype if dtype == "auto" else cast(Dtype, stored)).requires_grad_(False)
    wanted = held_dtype(dtype, model.dtype, device)
    if wanted == model.dtype and device.type == "cpu":
        return model, None
    try:
        if wanted != model.dtype:
            narrow = [b for b in model.buffers() if b.is_floating_point() and b.dtype != torch.float32]
            if narrow or any(getattr(model, name, None) for name in _EXCEPTIONS):
                raise NotWalkableError("parts of it are not cast")
        return model, LayerPlacement(model, wanted, device)
    except NotWalkableError:
        whole = load_base(base.directory, cast(Dtype, str(wanted).removeprefix("torch.")))
        return whole.requires_grad_(False).to(device), None
