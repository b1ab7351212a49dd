"""The one place where models and tokenizers of transformers are opened: local files only, never code of their own.

`trust_remote_code=False` is said each time: left out, transformers asks on the terminal, and `yes |` would answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from soka_serve.budget import open_regular, refuse_hole
from soka_serve.errors import CheckpointError
from soka_serve.files import read_errors
from soka_serve.foreign_code import check_no_adapter, check_no_code
from soka_serve.headers import read_json
from soka_serve.tokenizer import MAX_TOKENIZER_BYTES

_TOKENIZER_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")


def open_model(directory: Path, **options: Any) -> Any:
    """A causal language model from a checkpoint's safetensors, by transformers' own class for it.

    Args:
        directory: of the checkpoint.
        options: for `from_pretrained`.

    Raises:
        CheckpointError: it can be loaded by code of its own only, or an adapter lies beside it.
        OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError: what transformers raises of files that
            it cannot read.
    """
    from transformers import AutoModelForCausalLM

    check_no_code(directory)
    check_no_adapter(directory)
    return AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=False, use_safetensors=True, local_files_only=True, **options
    )


def open_tokenizer(directory: Path) -> Any:
    """A checkpoint's tokenizer, by transformers' own class for it, as vLLM opens it.

    Raises:
        CheckpointError: it can be loaded by code of its own only, a file is none or far too large, or transformers
            cannot make a tokenizer of its files.
    """
    from transformers import AutoTokenizer

    check_no_code(directory)
    _check_tokenizer_files(directory)
    try:
        return AutoTokenizer.from_pretrained(
            str(directory),
            trust_remote_code=False,
            local_files_only=True,
            mistral_format=False,  # files of Mistral's own format, which vLLM leaves aside as well
        )
    except Exception as error:
        raise CheckpointError(
            f"{directory}: transformers cannot build this tokenizer: {type(error).__name__}: {error!s:.1000}",
            hint="look for a wrong value in tokenizer_config.json, config.json and tokenizer.json",
        ) from error


def _check_tokenizer_files(directory: Path) -> None:
    """What a class may read is regular, of a size that can be read, and in the directory."""
    for file in sorted(directory.iterdir()) + sorted(directory.glob("additional_chat_templates/*")):
        if file.suffix not in _TOKENIZER_SUFFIXES or file.is_dir():
            continue
        with read_errors(file), open_regular(file) as stream:
            size = file.stat().st_size
            if size > MAX_TOKENIZER_BYTES:
                raise CheckpointError(f"{file}: {size:,} bytes; at most {MAX_TOKENIZER_BYTES:,} are read")
            refuse_hole(file, stream)
    settings = directory / "tokenizer_config.json"
    named = read_json(settings).get("fast_tokenizer_files") if settings.is_file() else None
    if named is not None and named != ["tokenizer.json"]:
        raise CheckpointError(
            f"{settings}: fast_tokenizer_files {named!r:.200}: transformers would read one of these instead of "
            "tokenizer.json, by its version",
            hint="take fast_tokenizer_files out",
        )
