"""The process in which `plan` has transformers open a tokenizer; answers with one JSON object on stdout."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from soka_serve.base.served_tokenizer import open_backend
from soka_serve.errors import CheckpointError


def main(directory: str) -> None:
    """Open the tokenizer in `directory` and write what `read_served` needs, or the error."""
    answer = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no part of it
    try:
        backend, settings = open_backend(Path(directory))
        value: dict[str, Any] = {"settings": asdict(settings), "backend": backend.to_str()}
    except CheckpointError as error:
        value = {"error": error.message, "hint": error.hint}
    with os.fdopen(answer, "w", encoding="utf-8") as stream:
        json.dump(value, stream)
