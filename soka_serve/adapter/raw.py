"""What an adapter directory says of itself, as bytes: its config and the header of its weights, not parsed yet."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from soka_serve.errors import CheckpointError, name_some
from soka_serve.io.budget import ReadingBudget
from soka_serve.io.file_names import CONFIG_FILE, WEIGHTS_FILE
from soka_serve.io.json_files import read_json_text
from soka_serve.io.safetensors import PICKLE_SUFFIXES, RawHeader, read_raw_header


@dataclass(frozen=True)
class RawAdapter:
    """An adapter's config and header as they were read.

    Args:
        config: text of adapter_config.json; None where it cannot be read.
        header: of adapter_model.safetensors; None where it cannot be read.
        problems: why, and what else is wrong with the directory.
    """

    config: str | None
    header: RawHeader | None
    problems: tuple[str, ...]

    @cached_property
    def layout(self) -> bytes | None:
        """A hash of all that is known of the adapter before its values; None where there are problems.

        Two adapters with the same layout have the same config, tensors, shapes and places in the file: everything that
        is checked before the values are read.
        """
        if self.problems or self.config is None or self.header is None:
            return None
        digest = hashlib.sha256(f"{self.header.size} {len(self.header.text)}\n".encode())
        digest.update(self.header.text)
        digest.update(self.config.encode())
        return digest.digest()


def read_raw(folder: Path, budget: ReadingBudget) -> RawAdapter:
    """Read what an adapter directory says of itself.

    Args:
        folder: the adapter.
        budget: what reading it may take.

    Raises:
        CheckpointError: there is no such directory.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such directory", hint=f"give the folder that holds {CONFIG_FILE}")
    problems = _check_files(folder)
    config = header = None
    try:
        config = read_json_text(folder / CONFIG_FILE, budget)
    except CheckpointError as error:
        problems.append(error.message)
    try:
        header = read_raw_header(folder / WEIGHTS_FILE, budget)
    except CheckpointError as error:
        problems.append(error.message)
    return RawAdapter(config, header, tuple(problems))


def _check_files(folder: Path) -> list[str]:
    """Refuse pickles, except in a resume point, whose own ones (of the Trainer) nothing here opens."""
    if (folder / "trainer_state.json").exists():
        return []
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if not pickles:
        return []
    return [f"pickles, which can run code when loaded, have no place in an adapter: {name_some(pickles)}"]
