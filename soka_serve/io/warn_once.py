"""Warnings that one command gives once, however many of its parts meet the same cause."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from soka_serve.io.scoped import scoped

_told: ContextVar[set[str] | None] = ContextVar("told", default=None)


@contextmanager
def one_command() -> Iterator[None]:
    """Remember what `warn` says until the end of the block; within another one, that of the outer block."""
    if _told.get() is not None:
        yield
        return
    with scoped(_told, set()):
        yield


def warn(logger: logging.Logger, message: str, *args: object) -> None:
    """Log a warning, unless this command has given the same one.

    Args:
        logger: of the caller.
        message, args: as for `logging.Logger.warning`.
    """
    told, text = _told.get(), message % args
    if told is None or text not in told:
        logger.warning("%s", text)
    if told is not None:
        told.add(text)
