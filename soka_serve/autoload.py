"""Where torch looked for `soka_autoload` once: environments that have not been installed again still call it here."""

from __future__ import annotations


def install() -> None:
    """As `soka_autoload.install`, where that is to be found; never raises, for torch would fail with it."""
    try:
        from soka_autoload import install as install_finder
    except ImportError:  # until soka-serve is installed again, PEFT knows the type after `import soka_serve.peft`
        return
    install_finder()
