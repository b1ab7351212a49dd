"""Read a manifest: TOML text to frozen models, with every problem located.

Reading, parsing and validating are three functions; `read_manifest` is the three in a row.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from soka_serve.errors import ManifestError, ManifestProblem
from soka_serve.io import toml_text
from soka_serve.io.budget import open_regular
from soka_serve.io.safetensors import read_exactly
from soka_serve.manifest.locate import Positions, locate
from soka_serve.manifest.nodes import TomlPath
from soka_serve.manifest.problems import dotted, explain, show
from soka_serve.manifest.schema import NAME_PATTERN, SCHEMA_VERSION, Manifest

M = TypeVar("M", bound=BaseModel)
_MOST = 10  # large integers that are named
MAX_BYTES = 256 << 10  # of a manifest or a suite; those that ship have a few thousand

_BYTE_ORDER_MARKS = {
    b"\xef\xbb\xbf": "begins with a UTF-8 byte-order mark",
    b"\xff\xfe": "is UTF-16",
    b"\xfe\xff": "is UTF-16",
}
_TOML_ERROR = re.compile(r"^(?P<what>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)$", re.S)
_BEYOND = re.compile(r"^(?P<what>.*) \(at line (?P<line>\d+)\)$", re.S)
_SYNTAX_HINTS = {
    "Cannot overwrite a value": "a key is written twice",
    "Cannot declare": "a table is written twice; rules take double brackets, [[adapt]]",
    "Cannot mutate immutable namespace": "a table in braces cannot be extended further down",
    "Invalid value": 'text stands in quotes, and true and false are small: key = "value"',
}


@dataclass(frozen=True)
class LoadedManifest:
    """A manifest and where it came from.

    `manifest.name` is always filled in. `directory` is what relative paths in the manifest start from. `sha256` is
    the hash of the file's bytes.
    """

    manifest: Manifest
    path: Path
    directory: Path
    text: str
    sha256: str

    def name_key(self, path: TomlPath) -> str:
        """A key for messages: 'math.toml:4:1: adapt[0].layers'."""
        return name_key(path, self.text, str(self.path))


def name_key(path: TomlPath, text: str, file: str) -> str:
    """File, line and column of a key, or of the nearest table around it, and the key as messages show it."""
    position = _locate(text).value(path)
    return ":".join([file, *map(str, position or ())]) + f": {dotted(path)}"


def read_manifest(path: str | Path) -> LoadedManifest:
    """Read, parse and validate a manifest.

    Raises:
        ManifestError: the file cannot be read, is not TOML, or does not follow the schema; holds all problems.
    """
    path = Path(path)
    text = read_text(path)
    manifest = parse_manifest(text, str(path))
    if manifest.name is None:
        manifest = _name_after_file(manifest, path)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return LoadedManifest(manifest, path, path.absolute().parent, text, sha256)


def parse_manifest(text: str, file: str) -> Manifest:
    """Parse and validate a manifest's text; `file` is what errors call it."""
    data = parse_toml(text, file)
    return validate_manifest(data, text, file)


def read_text(path: Path) -> str:
    """Read a file as UTF-8, line ends as they are.

    Raises:
        ManifestError: there is no such file, it cannot be read (a pipe or a device, say), it is too large, or it is not
            UTF-8.
    """
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            raw = b"" if size > MAX_BYTES else read_exactly(stream, MAX_BYTES)
    except FileNotFoundError:
        raise _file_error(path, "there is no such file", _similar_file(path)) from None
    except IsADirectoryError:
        raise _file_error(path, "is a directory; expected a TOML file", _manifests_in(path)) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise _file_error(path, f"cannot be read: {reason}") from None
    if size > MAX_BYTES:
        raise _file_error(path, f"has {size:,} bytes; at most {MAX_BYTES:,} are read", "is it a manifest?")
    for mark, what in _BYTE_ORDER_MARKS.items():
        if raw.startswith(mark):
            raise _file_error(path, what, "save it as UTF-8 without a byte-order mark", (1, 1))
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode()
        line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
        message = f"is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}"
        raise _file_error(path, message, "save it as UTF-8", (line, column)) from None


def parse_toml(text: str, file: str) -> dict[str, Any]:
    """Parse TOML.

    Raises:
        ManifestError: the text is empty, not TOML, or nested beyond all measure; with the line and column.
    """
    try:
        data = toml_text.parse_toml(text)
    except RecursionError:
        raise ManifestError(file, [ManifestProblem("", "arrays or tables are nested too deeply")]) from None
    except tomllib.TOMLDecodeError as error:
        raise ManifestError(file, [_syntax_problem(str(error), text)]) from None
    except ValueError as error:
        if str(error).startswith("brackets"):
            raise ManifestError(file, [ManifestProblem("", "arrays or tables are nested too deeply")]) from None
        beyond = _BEYOND.match(str(error))
        if beyond is None:  # int() refuses thousands of digits
            raise ManifestError(file, [ManifestProblem("", "an integer has too many digits")]) from None
        raise ManifestError(file, [ManifestProblem("", f"has {beyond['what']}", int(beyond["line"]), 1)]) from None
    if not data:
        hint = "`soka-serve init NAME` writes a starter"
        raise ManifestError(file, [ManifestProblem("", "is empty; expected a manifest", hint=hint)])
    return data


def validate_manifest(data: dict[str, Any], text: str, file: str) -> Manifest:
    """Check parsed TOML against the schema; `text` is what it was parsed from, for positions.

    Raises:
        ManifestError: everything that is wrong, each with its place.
    """
    if large := list(_large_integers(data)):
        positions, what = _locate(text), "expected a whole number of at most 64 bits, as TOML has them"
        found = [ManifestProblem(dotted(path), what, *(positions.value(path) or (0, 0))) for path in large[:_MOST]]
        more = [ManifestProblem("", f"and {len(large) - _MOST:,} more problems")] if len(large) > _MOST else []
        raise ManifestError(file, [*found, *more])
    version = data.get("schema")
    if type(version) is int and version != SCHEMA_VERSION:
        # What another version's keys mean is unknown here: anything else said about them would be noise.
        line, column = _locate(text).value(("schema",)) or (0, 0)
        message = f"this soka-serve reads version {SCHEMA_VERSION}; got {show(version)}"
        hint = "a newer soka-serve may read it" if version > SCHEMA_VERSION else f"write schema = {SCHEMA_VERSION}"
        raise ManifestError(file, [ManifestProblem("schema", message, line, column, hint)])
    return validate(Manifest, data, text, file)


def validate(model: type[M], data: dict[str, Any], text: str, file: str) -> M:
    """Check parsed TOML against a pydantic model; `text` is what it was parsed from, for positions.

    Raises:
        ManifestError: everything that is wrong, each with its place.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ManifestError(file, explain(error, _locate(text), model)) from None


def _large_integers(value: object, path: TomlPath = ()) -> Iterator[TomlPath]:
    """Where integers stand that tomllib reads and TOML does not have: neither a float nor text takes the largest."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in items:
            yield from _large_integers(part, (*path, key))
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        yield path


def json_schema(model: type[BaseModel] = Manifest, kind: str = "manifest") -> dict[str, Any]:
    """The JSON Schema of a manifest, or of another kind of file, for editors.

    Draft 7, which the TOML language servers read: no `$defs`, no `prefixItems`. TOML has no null, so optional keys
    lose theirs.

    Args:
        model: the file's schema.
        kind: what such a file is called; it goes into the schema's title and id.
    """
    schema = _for_editors(copy.deepcopy(model.model_json_schema(by_alias=True)))
    for name, table in schema["definitions"].items():
        if name.startswith("Rank"):
            table["required"] = sorted({"policy", *table.get("required", ())})
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$id": f"urn:soka-serve:{kind}:{SCHEMA_VERSION}",
        "title": f"soka-serve {kind}",
        **schema,
    }


def _for_editors(node: Any) -> Any:
    """Rewrite one node, and all below it, from pydantic's draft 2020-12 to draft 7."""
    if isinstance(node, list):
        return [_for_editors(item) for item in node]
    if not isinstance(node, dict):
        return node
    out: dict[str, Any] = {}
    for key, value in node.items():
        if key == "$ref":
            reference = {key: value.replace("#/$defs/", "#/definitions/")}
            # Draft 7 ignores what stands next to a reference.
            out.update(reference if len(node) == 1 else {"allOf": [reference]})
        elif key == "default":
            if value is not None:
                out[key] = _without_null(value)
        elif key == "$defs":
            out["definitions"] = _for_editors(value)
        elif key == "properties":
            out[key] = {name: _for_editors(child) for name, child in value.items()}
        elif key == "prefixItems":
            out["items"] = _for_editors(value[0])  # the only one is [m, n, p, q], of one type
        elif key == "anyOf":
            options = [_for_editors(option) for option in value if option.get("type") != "null"]
            out.update(options[0] if len(options) == 1 else {key: options})
        elif key not in ("discriminator", "title"):  # pydantic titles each key with its own name, which is noise
            out[key] = _for_editors(value)
    return out


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def _locate(text: str) -> Positions:
    try:
        return locate(text)
    except RecursionError:  # nested as deeply as tomllib just bears: report without positions
        return Positions()


def _syntax_problem(message: str, text: str) -> ManifestProblem:
    match = _TOML_ERROR.match(message)
    what, line, column = message, 0, 0
    if match is not None:
        what = match["what"]
        if match["line"] is not None:
            line, column = int(match["line"]), int(match["column"])
        else:  # at the end of the text
            line, column = text.count("\n") + 1, len(text) - (text.rfind("\n") + 1) + 1
    hint = next((hint for start, hint in _SYNTAX_HINTS.items() if what.startswith(start)), None)
    if line >= len(text.rstrip().splitlines()) + 1:
        hint = "the file ends inside an array, a table or a string"
    return ManifestProblem("", f"is not valid TOML: {what[:1].lower()}{what[1:]}", line, column, hint)


def _name_after_file(manifest: Manifest, path: Path) -> Manifest:
    if not re.fullmatch(NAME_PATTERN, path.stem) or len(path.stem) > 100:
        message = f"the file's name, {show(path.stem)}, cannot name a build"
        hint = "write name = \"...\" with letters, digits, '.', '_' and '-'"
        raise ManifestError(str(path), [ManifestProblem("name", message, hint=hint)])
    return manifest.model_copy(update={"name": path.stem})


def _file_error(path: Path, message: str, hint: str | None = None, place: tuple[int, int] = (0, 0)) -> ManifestError:
    return ManifestError(str(path), [ManifestProblem("", message, *place, hint)])


def _similar_file(path: Path) -> str | None:
    try:
        names = [child.name for child in path.parent.iterdir() if child.suffix == ".toml"]
    except (OSError, ValueError):
        return None
    close = get_close_matches(path.name, names, n=1)
    return f"did you mean {path.parent / close[0]}?" if close else None


def _manifests_in(path: Path) -> str | None:
    try:
        names = sorted(child.name for child in path.iterdir() if child.suffix == ".toml")
    except OSError:
        return None
    return f"it holds {', '.join(names[:5])}" if names else None
