"""Settings of the plugin that are read from the environment when a process of vLLM starts."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from soka_serve import __version__

BUILDS_VARIABLE = "SOKA_BUILDS"
ROOTS_VARIABLE = "SOKA_ADAPTER_ROOTS"
METRICS_VARIABLE = "SOKA_METRICS_DIR"  # the plugin's own: set by the first process of a server for the others
METRICS_PREFIX = "soka-metrics-"  # of that folder's name
LORA_VARIABLE = "SOKA_LORA"
KEEP_VARIABLE = "SOKA_KEEP_ADAPTERS_GIB"
SUMS_VARIABLE = "SOKA_SUMS"
TURN_VARIABLE = "SOKA_TURN_SECONDS"
SLOT_VARIABLE = "SOKA_SLOT_PARAMETERS"
COMPILE_VARIABLE = "SOKA_COMPILE"
SLOT_DEFAULT = 25_000_000  # two terms on every projection of a 70B model on one GPU: what a start from weights exports
_SALT_VARIABLE = "SOKA_SUMS_SALT"  # the plugin's own: of the numbers of sums, the same in all processes of a server
_KEEP_DEFAULT_GIB = 4.0
_SUMS_DEFAULT = 32
_TURN_DEFAULT_S = 1.0


def serves_lora() -> bool:
    """Whether ordinary LoRA adapters are served beside Kronecker ones (SOKA_LORA, by default they are).

    Raises:
        ValueError: the environment variable is neither 0 nor 1.
    """
    return _is_on(LORA_VARIABLE)


def compiles() -> bool:
    """Whether the operator is compiled for the CPU that it runs on (SOKA_COMPILE, by default it is).

    Raises:
        ValueError: the environment variable is neither 0 nor 1.
    """
    return _is_on(COMPILE_VARIABLE)


def has_metrics_folder() -> bool:
    """Whether an earlier process of this server has made the folder of SOKA_METRICS_DIR, and shows what is in it.

    A folder that a user has set there is not such a one: nothing would read it.
    """
    return Path(os.environ.get(METRICS_VARIABLE, "")).name.startswith(METRICS_PREFIX)


def keep_limit() -> int:
    """Bytes of adapters that each worker keeps in CPU memory (SOKA_KEEP_ADAPTERS_GIB).

    Raises:
        ValueError: the environment variable is not a number of at least 0.
    """
    gib = _number(KEEP_VARIABLE, _KEEP_DEFAULT_GIB, "GiB")
    return int(gib * 2**30)


def sums_limit() -> int:
    """How many sums of adapters are kept (SOKA_SUMS); 0: none are served.

    Raises:
        ValueError: the environment variable is not a whole number of at least 0.
    """
    text = os.environ.get(SUMS_VARIABLE, str(_SUMS_DEFAULT))
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ValueError(f"{SUMS_VARIABLE} is {text!r}, expected a whole number, 0 or more")
    return int(text)


def sums_salt() -> str:
    """What the numbers of this server's sums are made from, beside the sums; set by its first process that asks."""
    return os.environ.setdefault(_SALT_VARIABLE, secrets.token_hex(8))


def turn_seconds() -> float:
    """How long a request waits before adapters of the running batch make room for its own (SOKA_TURN_SECONDS).

    Raises:
        ValueError: the environment variable is not a number of at least 0.
    """
    return _number(TURN_VARIABLE, _TURN_DEFAULT_S, "seconds")


def slot_values() -> int:
    """How many values an adapter's factors may have on one GPU, all layers together (SOKA_SLOT_PARAMETERS).

    Raises:
        ValueError: the environment variable is not a positive integer.
    """
    text = os.environ.get(SLOT_VARIABLE, str(SLOT_DEFAULT))
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"{SLOT_VARIABLE}: expected a positive integer; got {text!r}")
    return int(text)


def compile_factors(stock: Callable[[], dict[str, object]]) -> dict[str, object]:
    """vllm.envs.compile_factors: what a compiled graph depends on of the plugin, beside what it does of vLLM.

    LoRA's part of a layer is in the graph or not, and so are the sizes of the arena. Without the plugin the graph has
    none of its calls, and would leave all adapters out.
    """
    own = {"soka_vllm": __version__, LORA_VARIABLE: serves_lora(), SLOT_VARIABLE: slot_values()}
    return {**stock(), **own}


def _is_on(variable: str) -> bool:
    text = os.environ.get(variable, "1")
    if text not in ("0", "1"):
        raise ValueError(f"{variable} is {text!r}, expected 0 or 1")
    return text == "1"


def _number(variable: str, default: float, unit: str) -> float:
    text = os.environ.get(variable, str(default))
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(f"{variable} is {text!r}, expected a number of {unit}, 0 or more")
    return value
