"""A model's folder, whose files beside the weights are each opened once."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from soka_serve.errors import CheckpointError
from soka_serve.io.budget import open_regular, refuse_hole
from soka_serve.io.files import read_errors
from soka_serve.io.json_files import parse_json, read_json

# The largest tokenizer.json in use have some 40 MB.
MAX_TOKENIZER_BYTES = 512 << 20


class ModelFolder:
    """The files of a model beside its weights. Each is opened when it is first asked for, and what it says is kept.

    Args:
        directory: of the model; it need not hold weights.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._objects: dict[str, dict[str, Any]] = {}
        self._contents: dict[str, bytes] = {}

    @property
    def config(self) -> dict[str, Any]:
        """config.json; CheckpointError where there is none, or it is malformed."""
        return self.json("config.json") or read_json(self.directory / "config.json")

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file, not to be changed; {} where there is no such file.

        Raises:
            CheckpointError: the file cannot be read, or holds something else.
        """
        if name not in self._objects:
            file = self.directory / name
            if name in self._contents:
                self._objects[name] = parse_json(file, self._contents.pop(name))
            elif file.is_file():
                self._objects[name] = read_json(file)
            else:
                return {}
        return self._objects[name]

    def content(self, name: str) -> bytes:
        """What a file holds.

        Raises:
            CheckpointError: it is missing, no regular file, mostly a hole, or larger than any tokenizer.
        """
        if name not in self._contents:
            self._contents[name] = self._open(name, read=True)
        return self._contents[name]

    def check(self, name: str) -> None:
        """Refuse a file as `content` does, without reading it; what was read is fine."""
        if name not in self._objects and name not in self._contents:
            self._open(name, read=False)

    def _open(self, name: str, *, read: bool) -> bytes:
        file = self.directory / name
        with read_errors(file), open_regular(file) as stream:
            size = file.stat().st_size
            if size > MAX_TOKENIZER_BYTES:
                raise CheckpointError(f"{file}: {size:,} bytes; at most {MAX_TOKENIZER_BYTES:,} are read")
            refuse_hole(file, stream)
            return stream.read(size) if read else b""

    @cached_property
    def backend(self) -> Tokenizer:
        """tokenizer.json as it stands, read by the tokenizers library; without the padding and truncation of the run
        that saved it.

        Raises:
            CheckpointError: there is none, it is too large, or no tokenizer.
        """
        file = self.directory / "tokenizer.json"
        if not file.is_file():
            if (self.directory / "tokenizer.model").is_file():
                raise CheckpointError(
                    f"{self.directory}: only tokenizer.model; expected tokenizer.json",
                    hint='Convert it once: python -c "from transformers import AutoTokenizer as T; '
                    f"T.from_pretrained('{self.directory}').save_pretrained('{self.directory}')\"",
                )
            raise CheckpointError(
                f"{self.directory}: no tokenizer.json", hint="Put the base's tokenizer files next to it."
            )
        try:
            backend = Tokenizer.from_buffer(self.content(file.name))
        except CheckpointError:
            raise
        except Exception as error:  # noqa: BLE001  (tokenizers raises bare Exception for every malformed file)
            raise CheckpointError(f"{file}: not a tokenizer: {error}") from None
        del self._contents[file.name]
        backend.no_padding()
        backend.no_truncation()
        return backend
