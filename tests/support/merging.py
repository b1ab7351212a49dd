"""Merging in tests: quiet, and unverified unless asked for."""

from __future__ import annotations

from pathlib import Path

from soka_serve.compiler.merge.merge import merge


def run(adapter: Path, base: Path, out: Path, **options: object) -> None:
    """Merge one adapter."""
    merge(adapter, base=base, out=out, progress=False, **{"verify": False, **options})  # type: ignore[arg-type]
