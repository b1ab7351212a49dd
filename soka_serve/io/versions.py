"""Versions of the packages that a result was made with."""

from __future__ import annotations

import platform
from importlib import metadata

_PACKAGES = ("soka-serve", "torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {package: installed(package) or "not installed" for package in _PACKAGES}
    return {"python": platform.python_version(), **found}


def installed(package: str) -> str | None:
    """The version of an installed distribution; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions_of(*packages: str) -> dict[str, str]:
    """Versions of those of the packages that are installed."""
    return {package: found for package in packages if (found := installed(package)) is not None}
