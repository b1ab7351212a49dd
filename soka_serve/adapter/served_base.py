"""The base that a server serves: the hash of its weights, and whether it is quantised."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from soka_serve.base.checkpoint import Checkpoint
from soka_serve.base.folder import ModelFolder
from soka_serve.base.quantisation import read_quantisation
from soka_serve.errors import SokaError
from soka_serve.io.own_cache import own_hashes
from soka_serve.io.workspace import HashCache


def served_sha256(directory: Path, log: logging.Logger, known: Iterable[HashCache] = ()) -> str:
    """Hash of a base's weights, as a soka.lock has it; files that this user's servers have hashed are not read again.

    Args:
        directory: of the base.
        log: is told when files are hashed, and when their hashes cannot be kept.
        known: hashes that others of this user have found.

    Raises:
        CheckpointError: no safetensors files, or some that cannot be read.
    """
    checkpoint, own = Checkpoint.open(directory), own_hashes()
    for hashes in known:
        own.adopt(hashes, checkpoint.files)
    size = sum(file.stat().st_size for file in checkpoint.files if not own.knows(file))
    if size > 1_000_000_000:
        log.info("Hashing the served base, %.2f GB in %s, to compare it with soka.lock", size / 1e9, directory)
    digest = checkpoint.sha256(own.file)
    try:
        own.save()
    except (OSError, SokaError) as error:
        log.warning("The base will be hashed again by the next server: %s", error)
    return digest


def is_quantised(directory: Path) -> bool:
    """Whether a base is a quantised checkpoint, whose weights are others than those of the base it was made of."""
    try:
        return read_quantisation(ModelFolder(directory)) is not None
    except SokaError:  # malformed, so that no engine has taken it for quantised
        return False
