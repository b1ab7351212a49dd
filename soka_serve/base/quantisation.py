"""What a checkpoint's config says of quantised weights: by which method, in how many bits, and where it says so.

Read are the places where transformers and vLLM look, so that what they take for quantised is so here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from soka_serve.base.folder import ModelFolder
from soka_serve.errors import CheckpointError, printable

# Keys of config.json, or of a config within it; vLLM also reads the file, of ModelOpt's older checkpoints.
_KEYS = ("quantization_config", "compression_config")
_FILE = "hf_quant_config.json"

_BITS = ("bits", "w_bit", "num_bits", "nbits", "weight_bits")
_DEEPEST = 4  # configs within configs
_MOST_BITS = 64
_SHOWN = 60  # characters of a value


# What `base.quantize` may say besides 'none', and `soka_quantize` of an adapter: held in so many bits by bitsandbytes.
QUANTIZE = ("4bit", "8bit")


@dataclass(frozen=True)
class Quantisation:
    """How a checkpoint's weights are quantised.

    Args:
        place: what says so: a file and the dotted key in it.
        method: as it stands there ('gptq'), printable.
        bits: of a weight; None where the config does not say, or names several.
    """

    place: str
    method: str
    bits: int | None

    def to_text(self) -> str:
        """For a message: 'gptq, 4 bits'."""
        return self.method if self.bits is None else f"{self.method}, {self.bits} bits"


def read_quantisation(folder: ModelFolder) -> Quantisation | None:
    """How the weights of a checkpoint are quantised; None where nothing says that they are.

    Raises:
        CheckpointError: config.json cannot be read, or what it says of quantisation is malformed.
    """
    file = folder.directory / "config.json"
    for key, value in _places(folder.config):
        place = f"{file}: {key}"
        if not isinstance(value, Mapping):
            shown = printable(repr(value), _SHOWN)
            raise CheckpointError(f"{place}: expected an object, got {shown}", hint=_mend(key))
        method = value.get("quant_method")
        if value.get("load_in_4bit") or value.get("load_in_8bit"):
            method = "bitsandbytes"  # whatever it says, as in transformers
        if not isinstance(method, str) or not method:
            raise CheckpointError(
                f"{place}: names no quant_method, so how the weights are quantised cannot be told", hint=_mend(key)
            )
        return Quantisation(place, printable(method, _SHOWN), _bits(value, method))
    if said := folder.json(_FILE):
        inner = said.get("quantization")
        said = dict(inner) if isinstance(inner, Mapping) else said
        return Quantisation(f"{folder.directory / _FILE}", "modelopt", _bits(said, str(said.get("quant_algo"))))
    return None


def _mend(key: str) -> str:
    return f"fetch config.json again, or take {key} out of it if the weights are not quantised"


def _places(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """What stands at each key of quantisation, of the model first, then of the parts that it has configs for."""
    yield from ((prefix + key, config[key]) for key in _KEYS if config.get(key) is not None)
    for key, value in config.items():
        if key.endswith("_config") and key not in _KEYS and isinstance(value, Mapping) and prefix.count(".") < _DEEPEST:
            yield from _places(value, f"{prefix}{key}.")


def _bits(said: Mapping[str, Any], method: str) -> int | None:
    """Bits of a weight: as a number, in groups of layers, or in the method's name."""
    if said.get("load_in_4bit") or said.get("load_in_8bit"):
        return 4 if said.get("load_in_4bit") else 8
    groups = said.get("config_groups")
    parts = [said, *(groups.values() if isinstance(groups, Mapping) else ())]
    parts += [part.get("weights") for part in parts if isinstance(part, Mapping)]
    numbers = [part.get(key) for part in parts if isinstance(part, Mapping) for key in _BITS]
    found = {number for number in numbers if type(number) is int and 0 < number <= _MOST_BITS}
    if not found and (named := re.search(r"fp(\d)", method.lower())):
        return int(named[1])
    return found.pop() if len(found) == 1 else None
