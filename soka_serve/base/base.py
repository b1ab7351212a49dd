"""A base model on this machine, opened once and passed on."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from soka_serve.base.checkpoint import Checkpoint
from soka_serve.base.folder import ModelFolder
from soka_serve.base.foreign_code import check_no_adapter, check_no_code
from soka_serve.base.modules import BaseModules
from soka_serve.base.plain_weights import check_plain_weights, check_unquantised
from soka_serve.base.quantisation import Quantisation, read_quantisation
from soka_serve.base.read_modules import derive_modules, read_modules, weights_of
from soka_serve.base.served_tokenizer import open_served, read_served
from soka_serve.base.tokenizer import TextTokenizer
from soka_serve.base.tokenizer_class import reads_plainly, tokenizer_directory
from soka_serve.base.weight_map import WeightMap


class Base:
    """A base model. Each part of it is read when it is first asked for, and kept; errors are CheckpointErrors.

    Only `tokenizer` imports torch, and `layout` and `weights` of an architecture that is
    not LLaMA-like.

    Args:
        directory: of the model, with or without weights.
        hub: its hub id, if it has one.
    """

    def __init__(self, directory: Path, hub: str | None = None) -> None:
        self.folder = ModelFolder(directory)
        self.hub = hub

    @property
    def directory(self) -> Path:
        """Where it lies."""
        return self.folder.directory

    @property
    def name(self) -> str:
        """What `base_model_name_or_path` says of it: the hub id, or an absolute directory that PEFT can load."""
        return self.hub or str(self.directory.resolve())

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return self.folder.config

    @property
    def has_weights(self) -> bool:
        """Whether its weights are here, too."""
        return any(self.directory.glob("*.safetensors"))

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """Config, headers and index, without the weights' values."""
        return Checkpoint.open(self.directory, self.folder)

    @cached_property
    def layout(self) -> BaseModules:
        """Its modules, as the model that transformers loads has them; see `read_modules`."""
        return read_modules(self.checkpoint) if self.has_weights else derive_modules(self.folder)

    @cached_property
    def weights(self) -> WeightMap:
        """Where the checkpoint keeps the weight of each module."""
        return self.layout.weights if "layout" in self.__dict__ else weights_of(self.checkpoint)

    @cached_property
    def quantisation(self) -> Quantisation | None:
        """How its weights are quantised; None where nothing says that they are."""
        return read_quantisation(self.folder)

    @cached_property
    def tokenizer_folder(self) -> ModelFolder:
        """Where its tokenizer is opened, see `tokenizer_class.tokenizer_directory`."""
        place = tokenizer_directory(self.folder, self.hub)
        return self.folder if place == self.directory else ModelFolder(place)

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """The tokenizer as transformers, and so every server, opens it: for training and for answers."""
        return open_served(self.tokenizer_folder)

    @cached_property
    def planned_tokenizer(self) -> TextTokenizer:
        """The same without torch: tokenizer.json where that is sure to be the same, else by a process of its own."""
        folder = self.tokenizer_folder
        return TextTokenizer.from_folder(folder) if reads_plainly(folder) else read_served(folder)

    def check_plain(self) -> None:
        """Refuse weights that are quantised, or stored in what training and merging cannot keep."""
        check_unquantised(self.quantisation, self.directory)
        if self.has_weights:
            check_plain_weights(self.checkpoint.tensors)

    def check_adaptable(self) -> None:
        """Refuse what cannot be trained on: a model with code of its own, an adapter beside it, no plain weights."""
        check_no_code(self.folder)
        check_no_adapter(self.directory)
        self.check_plain()
