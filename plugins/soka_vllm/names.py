"""What a request for a model that is not there is told: which there are, and which was probably meant."""

from __future__ import annotations

import os
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from soka_serve.errors import printable
from soka_serve.io.names import MODEL_NAME_RULE, is_model_name
from soka_vllm.places import find_build

_SHOWN = 20  # names in one answer
_NO_NAME = "a part of the sum has no name"
_MOST_BUILDS = 1000  # entries of a folder of builds that are looked at for one answer


def missing_model(name: str, bases: Sequence[str], adapters: Sequence[str], parts: Sequence[str] = ()) -> str:
    """The message for a model that does not exist.

    Args:
        name: what a client asked for, so anything.
        bases: names of the base model.
        adapters: names of those that are served, or are loaded when they are asked for.
        parts: of a name that is read as a sum of adapters, those that are none; "" where a name is missing.

    >>> missing_model("mat", ["tiny"], ["code", "math"])
    'The model `mat` does not exist. Did you mean `math`? The base is tiny; adapters: code, math'
    >>> missing_model("mat+2*z", ["tiny"], ["math", "z"], ["mat"])
    'The model `mat+2*z` does not exist: no adapter `mat`. Did you mean `math`? The base is tiny; adapters: math, z'
    """
    if parts:
        rule = ": " + ", ".join(f"no adapter `{printable(part)}`" if part else _NO_NAME for part in parts)
        close = [near for part in parts for near in _near(part, adapters)]
    else:
        rule = "" if is_model_name(name) else f" ({MODEL_NAME_RULE})"
        close = _near(name, [*bases, *adapters])
    meant = f" Did you mean {' and '.join(f'`{near}`' for near in close)}?" if close else ""
    shown = ", ".join(adapters[:_SHOWN]) or "none"
    more = f" and {len(adapters) - _SHOWN} more" if len(adapters) > _SHOWN else ""
    there = f"The base is {', '.join(bases)}; adapters: {shown}{more}"
    return f"The model `{printable(name)}` does not exist{rule}.{meant} {there}"


def _near(name: str, known: Sequence[str]) -> list[str]:
    """The name that is nearest, if one is near; nothing is near what cannot be a name."""
    return get_close_matches(name, known[:_MOST_BUILDS], n=1) if is_model_name(name) else []


def build_names(folder: Path) -> list[str]:
    """Names of the adapters in a folder of builds that a request may ask for, in order; of the first 1,000 entries.

    None for a folder that cannot be listed: nothing can be loaded from it either.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in islice(entries, _MOST_BUILDS))
    except OSError:
        return []
    return [name for name in names if find_build(folder, name) is not None]
