"""Read a suite: TOML text to frozen models, with every problem located."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import Any

from soka_serve.comparison.settings import disagreement, mismatches, refusal
from soka_serve.comparison.suite import Suite
from soka_serve.compiler.methods import METHODS
from soka_serve.errors import ManifestError, ManifestProblem
from soka_serve.io.files import sha256_text
from soka_serve.io.places import given_path
from soka_serve.manifest.locate import locate
from soka_serve.manifest.nodes import TomlPath
from soka_serve.manifest.optimisers import DEFAULT_OPTIMISER
from soka_serve.manifest.problems import dotted, show
from soka_serve.manifest.read import name_key, parse_toml, read_text, validate

_FEWEST_SEEDS = 5  # whose sign-flip test can give less than 5%: 1 / 2**5


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
    if problems := [
        ManifestProblem(dotted(path), message, *(positions.value(path) or (0, 0)))
        for path, message in (*_protocol(suite), *_names(suite), *_grids(suite), *_claims(suite))
    ]:
        raise ManifestError(file, problems)
    return suite


def _protocol(suite: Suite) -> Iterator[tuple[TomlPath, str]]:
    """More finalists than settings by default, and an optimiser that a method would not take."""
    if (suite.protocol.finalists or 0) > suite.settings:
        yield ("protocol", "finalists"), f"finalists is larger than settings ({suite.settings}, the default)"
    recipe: Any = suite.train
    for i, contender in enumerate(suite.method):
        own = contender.words.get("optimiser")
        if METHODS[contender.method].brings_optimizer and (own or recipe.optimiser) != DEFAULT_OPTIMISER:
            yield (
                ("method", i, "train", "optimiser") if own else ("train", "optimiser"),
                f"{contender.name} is trained with AdamW whatever this says: method = {contender.method!r} has "
                "rates of its own",
            )


def _names(suite: Suite) -> Iterator[tuple[TomlPath, str]]:
    """Names that stand twice."""
    for table in ("dataset", "method", "other"):
        names = [item.name for item in getattr(suite, table)]
        for i, name in enumerate(names):
            if name in names[:i]:
                yield (table, i, "name"), f"{show(name)} is the name of another {table} already"


def _grids(suite: Suite) -> Iterator[tuple[TomlPath, str]]:
    """Datasets that are not there, axes that no manifest has, and methods that are not searched while others are."""
    searched = [any(len(values) > 1 for values in contender.grid.values()) for contender in suite.method]
    for i, contender in enumerate(suite.method):
        for name in contender.datasets or ():
            yield from _unknown(("method", i, "datasets"), "dataset", name, [d.name for d in suite.dataset])
        if any(searched) and not searched[i]:
            yield ("method", i, "grid"), "one setting, and other methods have a choice: give an axis a second value"
        wrong: set[str] = set()
        for axis, values in contender.grid.items():
            refused = filter(None, (refusal(suite, contender, axis, value) for value in values))
            for message in islice(refused, 1):
                yield ("method", i, "grid", axis), message
                wrong.add(axis)
        for one, other in combinations((axis for axis in contender.grid if axis not in wrong), 2):
            if clash := disagreement(suite, contender, (one, other)):
                yield ("method", i, "grid", other), clash
                wrong.add(other)
        for place, message in () if wrong else mismatches(suite, contender):
            yield ("method", i, *place), message


def _claims(suite: Suite) -> Iterator[tuple[TomlPath, str]]:
    """Claims that no results could decide."""
    methods, datasets = [m.name for m in suite.method], [d.name for d in suite.dataset]
    seeds = len(suite.protocol.seeds)
    for i, claim in enumerate(suite.claim):
        asked = [d for d in suite.dataset if claim.dataset in (None, d.name)]
        if claim.dataset is not None:
            yield from _unknown(("claim", i, "dataset"), "dataset", claim.dataset, datasets)
        for key in ("candidate", "reference"):
            name = getattr(claim, key)
            yield from _unknown(("claim", i, key), "method", name, methods)
            runs_on = [m.datasets for m in suite.method if m.name == name and m.datasets is not None]
            if lacking := [d.name for d in asked if runs_on and d.name not in runs_on[0]]:
                yield ("claim", i, key), f"{name} does not run on {', '.join(lacking)}"
        lacks = {
            "forgetting": not suite.other and "[[other]] texts",
            "accuracy": suite.protocol.answered == 0 and "answers, and protocol.answered is 0",
            "steps_to_loss": not all(d.loss_targets for d in asked) and "loss_targets in each [[dataset]]",
        }.get(claim.metric)
        if lacks:
            yield ("claim", i, "metric"), f"{claim.metric} needs {lacks}"
        if claim.pairs == "seeds" and seeds < _FEWEST_SEEDS:
            enough = f"give {_FEWEST_SEEDS} of them, or write pairs = 'examples'"
            yield ("claim", i, "pairs"), f"{seeds} seeds cannot show anything at 5%: {enough}"
    if suite.claim and sum(claim.primary for claim in suite.claim) != 1:
        yield ("claim",), "exactly one claim is the primary one: write primary = true in it"


def _unknown(path: TomlPath, kind: str, name: str, names: Sequence[str]) -> Iterator[tuple[TomlPath, str]]:
    if name not in names:
        yield path, f"no {kind} is called {show(name)}; there are {', '.join(names)}"
