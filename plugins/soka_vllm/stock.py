"""An ordinary LoRA adapter's files: held against the budget before vLLM's own reader opens them, and then read."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from soka_serve.adapter.format import KEY_PREFIX
from soka_serve.adapter.patterns import Matcher
from soka_serve.errors import CheckpointError
from soka_serve.io.budget import ReadingBudget, open_regular, refuse_hole
from soka_serve.io.file_names import CONFIG_FILE, WEIGHTS_FILE
from soka_serve.io.json_files import read_json
from soka_serve.io.safetensors import read_header, read_tensor

if TYPE_CHECKING:
    from torch import Tensor

_PICKLES = ("adapter_model.bin", "adapter_model.pt")  # in the order in which vLLM looks for them
_PATTERNS = ("rank_pattern", "alpha_pattern")


def look_at_lora(directory: Path, budget: ReadingBudget) -> Matcher:
    """Check the size of all that vLLM reads of a LoRA adapter, and its patterns.

    Args:
        directory: the adapter, with a config.
        budget: what reading it may take; the values are taken from it.

    Returns:
        What its patterns match among the names of its modules, of a pickle none.

    Raises:
        CheckpointError: files that are beyond the budget or malformed, patterns that cannot be matched.
    """
    config = read_json(directory / CONFIG_FILE, budget)
    names = []
    if (directory / WEIGHTS_FILE).is_file():
        tensors = read_header(directory / WEIGHTS_FILE, budget)
        budget.take_values(directory / WEIGHTS_FILE, sum(info.numel for info in tensors.values()))
        names = list(dict.fromkeys(_module_of(key) for key in tensors))
    else:
        for file in (directory / name for name in _PICKLES):
            if file.is_file():
                _look_at_pickle(file, budget)
                break
    matcher = Matcher(names, budget)
    for field in _PATTERNS:
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{CONFIG_FILE}: {field} must be an object, not {patterns!r:.120}")
        try:
            matcher.key_for(patterns, names[0] if names else "any")
        except ValueError as error:
            raise CheckpointError(f"{CONFIG_FILE}: {field}: {error}") from error
    return matcher


def _module_of(key: str) -> str:
    return key.removeprefix(KEY_PREFIX).rpartition(".lora_")[0]


def _look_at_pickle(file: Path, budget: ReadingBudget) -> None:
    """A file of `torch.save` must be an archive that holds no more than its size, of tensors within the budget."""
    import torch

    with open_regular(file) as stream:
        refuse_hole(file, stream)
        try:
            with zipfile.ZipFile(stream) as archive:
                parts = archive.infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise CheckpointError(f"{file}: not what torch.save writes: {error}; save it as {WEIGHTS_FILE}") from error
    budget.take_tensors(file, len(parts))
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise CheckpointError(f"{file}: compressed, which torch.save never does; save it as {WEIGHTS_FILE}")
    if sum(part.file_size for part in parts if part.filename.endswith(".pkl")) > budget.header_bytes:
        raise CheckpointError(f"{file}: its pickle is too large: at most {budget.header_bytes} bytes are read")
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged pickle raises
        raise CheckpointError(f"{file}: cannot be read: {error!s:.300}; save it as {WEIGHTS_FILE}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise CheckpointError(f"{file}: expected tensors by name; save them as {WEIGHTS_FILE}")
    budget.take_values(file, sum(value.numel() for value in tensors.values()))


class _Opened:
    """What vLLM's reader of LoRA uses of `safetensors.safe_open`: tensors are copies of what the file holds.

    `safe_open` maps the file: what overwrites it would be served, and to read what was cut off of it ends the process.

    Raises:
        CheckpointError: the file is malformed, or ends early.
    """

    def __init__(self, file: str, framework: str) -> None:
        self._tensors = read_header(Path(file))

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *error: object) -> None: ...

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def get_tensor(self, name: str) -> Tensor:
        return read_tensor(self._tensors[name])


def without_mapping(safetensors: Any) -> SimpleNamespace:
    """The module `safetensors` as vLLM's reader of LoRA has it, with a `safe_open` that maps no file."""
    return SimpleNamespace(**{**vars(safetensors), "safe_open": _Opened})
