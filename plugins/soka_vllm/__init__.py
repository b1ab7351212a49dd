"""vLLM plugin for Kronecker adapters, found through the entry point group `vllm.general_plugins`.

Importing it costs nothing; vLLM calls `register` in each of its processes.
"""

from __future__ import annotations


def register() -> None:
    """Teach this process's vLLM to load and run SoKA adapters; calling it again changes nothing.

    Raises:
        RuntimeError: the installed vLLM is not supported; the message names versions and what differs.
    """
    from soka_vllm.hooks import install

    install()
