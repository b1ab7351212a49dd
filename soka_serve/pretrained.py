"""The one place where models and tokenizers of transformers are opened: local files only, never code of their own.

`trust_remote_code=False` is said each time: left out, transformers asks on the terminal, and `yes |` would answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from soka_serve.errors import CheckpointError
from soka_serve.foreign_code import check_no_adapter, check_no_code
from soka_serve.tokenizer_class import check_tokenizer_files


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
    check_tokenizer_files(directory)
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
