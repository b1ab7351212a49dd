"""Turn pydantic's validation errors into problems with position, expectation and hint.

Each problem names the key as TOML spells it, stands at its line and column, and says what was expected, what came and,
where it can, what to write instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from soka_serve.errors import ManifestProblem
from soka_serve.manifest import nodes
from soka_serve.manifest.locate import Positions
from soka_serve.manifest.schema import Manifest

_MOST = 100  # problems that are explained; a file of another kind may have thousands
_SHOWN = 60  # characters of a value that a message repeats
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")

# Keys that other tools use, and what they are called here.
_FOREIGN_KEYS = {
    "lr": "learning_rate",
    "target_modules": "modules",
    "max_seq_length": "max_length",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulate",
    "lr_scheduler_type": "schedule",
    "optim": "optimiser",
    "optimizer": "optimiser",
    "warmup_ratio": "warmup_frac",
}
_REFUSED_KEYS = {"trust_remote_code": "soka-serve never runs code that comes with a checkpoint"}


def explain(error: ValidationError, positions: Positions, model: type[BaseModel] = Manifest) -> list[ManifestProblem]:
    """Turn a validation error of `model` into problems in the order of the file, file-wide ones first."""
    details = error.errors(include_url=False)
    below_it = {location[:i] for d in details for location in [d["loc"]] for i in range(len(location))}
    # When every rule of an array is wrong, pydantic also calls the array too short.
    details = [d for d in details if not (d["type"] == "too_short" and d["loc"] in below_it)]
    with nodes.nodes_of(model):
        problems = dict.fromkeys(_explain_one(d, positions) for d in details[:_MOST])
    found = sorted(problems, key=lambda p: (p.line, p.column))
    more = len(details) - _MOST
    return [*found, ManifestProblem("", f"and {more:,} more problems")] if more > 0 else found


def dotted(path: nodes.TomlPath) -> str:
    """Spell a path as messages show it.

    >>> dotted(("adapt", 1, "rank", "a b"))
    'adapt[1].rank."a b"'
    """
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if _BARE_KEY.fullmatch(part) else json.dumps(part, ensure_ascii=False)
            text += f".{name}" if text else name
    return text


def show(value: object) -> str:
    """A value as TOML would write it, shortened.

    >>> show(True), show("8"), show([1, 2]), show({"a": 1})
    ('true', '"8"', '[1, 2]', 'a table')
    """
    if isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, int):
        text = hex(value) if value.bit_length() > 200 else str(value)  # str() refuses huge numbers
    elif isinstance(value, str):
        text = json.dumps(value[: _SHOWN + 1], ensure_ascii=False)
    elif isinstance(value, list | tuple):
        text = f"[{', '.join(show(item) for item in value[:_SHOWN])}]"
    elif isinstance(value, Mapping):
        text = "a table"
    else:
        text = str(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _explain_one(detail: ErrorDetails, positions: Positions) -> ManifestProblem:
    location = nodes.walk(detail["loc"])
    kind, value = detail["type"], detail["input"]
    if kind == "missing":
        return _missing(location, positions)
    if kind == "union_tag_not_found":
        return _missing_policy(location, positions)
    if kind == "union_tag_invalid":
        words = list(nodes.policies_of(location.node or {}))
        path = (*location.path, "policy")
        came = value["policy"] if isinstance(value, Mapping) else value
        return _problem(
            path, f"expected {nodes.one_of(words)}; got {show(came)}", positions.value(path), _did_you_mean(came, words)
        )
    if kind == "extra_forbidden":
        return _unknown(location, positions)
    if kind == "conflict":
        return _problem(location.path, detail["msg"], positions.key(location.path))
    if kind in ("value_error", "layers"):
        return _problem(location.path, detail["msg"].removeprefix("Value error, "), positions.value(location.path))
    context = detail.get("ctx", {})
    wanted = context["expected"] if kind == "expected" else nodes.expected(location.node or {})
    words = context.get("words") or _words(location.node)
    hint = _did_you_mean(value, words) or _hint(location, value)
    return _problem(location.path, f"expected {wanted}; got {show(value)}", positions.value(location.path), hint)


def _problem(
    path: nodes.TomlPath, message: str, position: tuple[int, int] | None, hint: str | None = None
) -> ManifestProblem:
    line, column = position or (0, 0)
    return ManifestProblem(dotted(path), message, line, column, hint)


def _missing(location: nodes.Location, positions: Positions) -> ManifestProblem:
    node = location.node or {}
    raw = location.table["properties"][location.path[-1]]
    what = raw.get("description") or node.get("description", "")
    text = f"required, but missing; expected {nodes.expected(node)}"
    hint = (
        f"write {location.path[-1]} = {node['const']} on the first line"
        if location.path == ("schema",)
        else what.rstrip(".")
    )
    return _problem(location.path, text, positions.value(location.path[:-1]), hint or None)


def _missing_policy(location: nodes.Location, positions: Positions) -> ManifestProblem:
    words = list(nodes.policies_of(location.node or {}))
    hint = 'for example rank = { policy = "fixed", rank = 1 }'
    message = f"required, but missing; expected {nodes.one_of(words)}"
    return _problem((*location.path, "policy"), message, positions.value(location.path), hint)


def _unknown(location: nodes.Location, positions: Positions) -> ManifestProblem:
    key = str(location.path[-1])
    known = list(location.table["properties"])
    position = positions.key(location.path)
    owners = [policy for policy, table in location.policies.items() if key in table["properties"]]
    if owners:
        own = location.table["properties"]["policy"]["const"]
        belongs = f"{key} belongs to policy {nodes.one_of(owners)}; this rule's policy is {nodes.quote(own)}"
        return _problem(location.path, f"unknown key: {belongs}", position)
    if key in _REFUSED_KEYS:
        return _problem(location.path, "unknown key", position, _REFUSED_KEYS[key])
    elsewhere = dict.fromkeys(header for header, table in nodes.tables() if key in table["properties"])
    renamed = _FOREIGN_KEYS.get(key)
    hint: str | None
    if elsewhere and renamed not in known:
        hint = f"{key} belongs {_in(list(elsewhere))}"
    elif renamed in known:
        hint = f"did you mean {nodes.quote(renamed)}?"
    else:
        hint = _did_you_mean(key, known) or f"known here: {', '.join(known)}"
    return _problem(location.path, "unknown key", position, hint)


def _in(headers: list[str]) -> str:
    """'in [base] or [train.data]'; keys outside every table stand first in the file."""
    return " or ".join(f"in {header}" if header else "at the top of the file, before every table" for header in headers)


def _words(node: nodes.Node | None) -> list[str]:
    """The strings that a node accepts, for 'did you mean'."""
    node = node or {}
    return [word for word in [*node.get("enum", ()), node.get("const")] if isinstance(word, str)]


def _did_you_mean(came: object, words: list[str]) -> str | None:
    if not isinstance(came, str):
        return None
    folded = {word.lower(): word for word in words}
    close = get_close_matches(came.lower().replace("-", "_"), folded, n=1)
    return f"did you mean {nodes.quote(folded[close[0]])}?" if close else None


def _hint(location: nodes.Location, value: Any) -> str | None:
    """What to write instead of a value of the wrong type, where it is plain."""
    node = location.node or {}
    kind = node.get("type")
    name = dotted(location.path[-1:])
    if isinstance(value, str) and (
        (kind in ("integer", "number") and _NUMBER.fullmatch(value))
        or (kind == "boolean" and value in ("true", "false"))
    ):
        return f"write {value} without quotes"
    if kind == "integer" and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if kind == "string" and isinstance(value, int | float) and not isinstance(value, bool):
        return f'write "{show(value)}", in quotes'
    if kind == "array" and "properties" in (nodes.below(node, 0) or {}):
        return f"write [[{name}]], with double brackets" if isinstance(value, Mapping) else None
    if kind == "array" and isinstance(value, str):
        return f"write [{show(value)}]"
    if kind == "object" and isinstance(value, list):
        return f"write [{name}], with single brackets"
    if nodes.policies_of(node) and type(value) is int and value > 0:
        return f'write {name} = {{ policy = "fixed", rank = {value} }}'
    return None
