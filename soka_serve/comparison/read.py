"""Read a suite: TOML text to frozen models, with every problem located."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from soka_serve.comparison.settings import refusal
from soka_serve.comparison.suite import Suite
from soka_serve.errors import ManifestError, ManifestProblem
from soka_serve.io.files import sha256_text
from soka_serve.io.places import given_path
from soka_serve.manifest.locate import locate
from soka_serve.manifest.nodes import TomlPath
from soka_serve.manifest.problems import dotted
from soka_serve.manifest.read import name_key, parse_toml, read_text, validate


@dataclass(frozen=True)
class LoadedSuite:
    """A suite and where it came from; relative paths in it start from `directory`."""

    suite: Suite
    path: Path
    directory: Path
    text: str
    sha256: str

    def name_key(self, path: TomlPath) -> str:
        """A key for messages: 'suite.toml:4:1: base.path'."""
        return name_key(path, self.text, str(self.path))


def read_suite(path: str | Path, root: str | Path | None = None) -> LoadedSuite:
    """Read, parse and validate a suite.

    Args:
        path: the TOML file.
        root: what its relative paths start from; default: its own folder.

    Raises:
        ManifestError: the file cannot be read, is not TOML, or does not follow the schema; holds all problems.
    """
    path = Path(path)
    text = read_text(path)
    directory = path.absolute().parent if root is None else given_path(root, "root").absolute()
    return LoadedSuite(parse_suite(text, str(path)), path, directory, text, sha256_text(text))


def parse_suite(text: str, file: str) -> Suite:
    """Parse and validate a suite's text; `file` is what errors call it.

    Raises:
        ManifestError: everything that is wrong, each with its place.
    """
    suite = validate(Suite, parse_toml(text, file), text, file)
    positions = locate(text)
    problems = []
    for i, contender in enumerate(suite.method):
        for axis, values in contender.grid.items():
            path = ("method", i, "grid", axis)
            for message in filter(None, (refusal(suite, contender, axis, value) for value in values)):
                problems.append(ManifestProblem(dotted(path), message, *(positions.value(path) or (0, 0))))
                break
    if problems:
        raise ManifestError(file, problems)
    return suite
