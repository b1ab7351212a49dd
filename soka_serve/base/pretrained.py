"""The one place where models and tokenizers of transformers are opened: local files only, never code of their own.

`trust_remote_code=False` is said each time: left out, transformers asks on the terminal, and `yes |` would answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from soka_serve.base.folder import ModelFolder
from soka_serve.base.foreign_code import check_no_adapter, check_no_code
from soka_serve.base.tokenizer_class import check_tokenizer_files
from soka_serve.errors import CheckpointError

# What transformers raises, beside OSError, of configs that it cannot build a model from.
BUILD_ERRORS = (
    ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, AssertionError, ImportError,
)  # fmt: skip


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

    check_no_code(ModelFolder(directory))
    check_no_adapter(directory)
    with _strict_config(directory):
        return AutoModelForCausalLM.from_pretrained(
            directory, trust_remote_code=False, use_safetensors=True, local_files_only=True, **options
        )


def build_meta_model(directory: Path) -> Any:
    """The model that `open_model` would load, on the meta device: modules and shapes, no weights read.

    A `quantization_config` is not looked at: layers are those of the unquantised model.

    Raises:
        CheckpointError: it can be loaded by code of its own only, or transformers has no causal language model for it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    check_no_code(ModelFolder(directory))
    try:
        with quiet(), _strict_config(directory), torch.device("meta"):
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
            if type(config) not in AutoModelForCausalLM._model_mapping:
                raise CheckpointError(
                    f"{directory}: transformers has no causal language model for model_type {config.model_type!r}",
                    hint="give the checkpoint of its language model alone",
                )
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, *BUILD_ERRORS) as error:
        raise cannot_build(directory, error) from error


def cannot_build(directory: Path, error: Exception) -> CheckpointError:
    """The error for a checkpoint that transformers makes no model of."""
    return CheckpointError(
        f"{directory}: transformers cannot build this model: {first_line(error)}",
        hint="a causal language model that the installed transformers knows is needed; remote code is never run",
    )


def first_line(error: BaseException) -> str:
    """The first line of an exception's text; its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _strict_config(directory: Path) -> Iterator[None]:
    """A value of a wrong type in config.json raises CheckpointError: transformers' own error is of no common kind."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except StrictDataclassError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(
            f"{directory / 'config.json'}: {' '.join(lines)}", hint="correct the value, or copy config.json again"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own warnings: what matters here raises."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def open_tokenizer(directory: Path) -> Any:
    """A checkpoint's tokenizer, by transformers' own class for it, as vLLM opens it.

    Raises:
        CheckpointError: it can be loaded by code of its own only, a file is none or far too large, or transformers
            cannot make a tokenizer of its files.
    """
    from transformers import AutoTokenizer

    folder = ModelFolder(directory)
    check_no_code(folder)
    check_tokenizer_files(folder)
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
