"""Base models from the Hugging Face hub."""

from __future__ import annotations

import logging
from pathlib import Path

from soka_serve.errors import CheckpointError
from soka_serve.io.warn_once import warn

log = logging.getLogger(__name__)

_CONFIG_PATTERNS = ("*.json", "tokenizer*", "*.jinja", "*.model", "*.txt")
_WEIGHT_PATTERNS = ("*.safetensors",)
_BUNDLED = Path(__file__).parents[1] / "builtin" / "configs"


def fetch_snapshot(repository: str, revision: str | None, *, weights: bool) -> Path:
    """Fetch a hub model (or find it in the local cache) and return its directory.

    Args:
        repository: hub id, 'owner/name'.
        revision: branch, tag or commit; None is the default branch.
        weights: False leaves out the weights; a hub that cannot be reached is then replaced by the config inside the
            package, if there is one, with a warning.

    Raises:
        CheckpointError: gated, no such model or revision, or not to be reached; the hint says what to do.
    """
    from huggingface_hub import errors, snapshot_download

    name = f"hub model {repository!r}" + (f" at revision {revision!r}" if revision else "")
    patterns = [*_CONFIG_PATTERNS, *(_WEIGHT_PATTERNS if weights else ())]
    unreachable = errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError
    try:
        directory = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{name} is gated: its owner must grant you access",
            hint=f"accept the licence at https://huggingface.co/{repository}, then run `hf auth login` or set HF_TOKEN",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{name}: no such revision", hint="give a branch, tag or commit that exists") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name}: not found", hint="check the id; a private model needs `hf auth login` or HF_TOKEN"
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{name}: not a valid id", hint="hub ids look like 'owner/name'") from error
    except (*unreachable, ConnectionError, TimeoutError) as error:
        bundled = _BUNDLED / repository.replace("/", "--")
        if not weights and (bundled / "config.json").is_file():
            warn(log, "%s cannot be reached; planning with the config inside the package", name)
            return bundled
        raise CheckpointError(
            f"{name} cannot be reached, and is not in the local cache",
            hint="check the network (and HF_HUB_OFFLINE), fetch it elsewhere with `hf download` and copy the cache, "
            "or give a directory as base.path",
        ) from error
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{name}: config.json is missing in {directory}",
            hint="the download was cut short or the hub model is not a transformers checkpoint",
        )
    return directory
