"""Entry point of environments installed before `soka_autoload` was a package: torch calls `install` here at import."""

from __future__ import annotations


def install() -> None:
    """Call `soka_autoload.install` if the package is installed; never raises, since torch's import would fail."""
    try:
        from soka_autoload import install as install_finder
    except ImportError:  # until soka-serve is installed again, PEFT knows the type after `import soka_serve.peft`
        return
    install_finder()
