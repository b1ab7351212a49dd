"""The rule for names of models in a server's API."""

from __future__ import annotations

import re

# Of models in the API: also ids of a hub ("org/name"), and the ":" and "@" of versions.
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+-]*(?:/[A-Za-z0-9][A-Za-z0-9._:@+-]*)*")


_LONGEST_MODEL_NAME = 200


MODEL_NAME_RULE = (
    f"a name has 1 to {_LONGEST_MODEL_NAME} letters, digits and ._-:@+/, and begins with a letter or digit, as does "
    "each part between slashes"
)


def is_model_name(name: str) -> bool:
    """Whether a text is a valid name of a model in a server's API; see MODEL_NAME_RULE."""
    return len(name) <= _LONGEST_MODEL_NAME and _MODEL_NAME.fullmatch(name) is not None
