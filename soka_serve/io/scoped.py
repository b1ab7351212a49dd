"""Context variables that have a value within a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def scoped(variable: ContextVar[T], value: T) -> Iterator[T]:
    """Set a context variable until the end of the block; yields its value there."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)
