"""Where the task files are, which tasks run code, and which tasks fit a manifest. Imports neither torch nor lm-eval."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from soka_serve.builtin.tasks import TARGET_FAMILIES
from soka_serve.errors import EvalError, install_extra
from soka_serve.manifest.schema import Manifest

logger = logging.getLogger(__name__)


def tasks_directory() -> Path:
    """The folder for lm-eval's `include_path`: `eval/tasks` in a checkout, a folder of the package in a wheel.

    Raises:
        EvalError: neither is there.
    """
    package = Path(__file__).resolve().parent
    places = (package / "task_files", package.parents[1] / "eval" / "tasks")
    for place in places:
        if any(place.glob("*/*.yaml")):
            return place
    raise EvalError(
        f"no task files: expected *.yaml in {places[0]} or {places[1]}", hint="Install soka-serve again: pip install ."
    )


@cache
def _own_tasks() -> Mapping[str, Mapping[str, Any]]:
    """Tasks and groups of ours by name, functions left as text."""
    found: dict[str, Mapping[str, Any]] = {}
    for file in sorted(tasks_directory().glob("*/*.yaml")):
        config = _read_task(file)
        name = config.get("group") or config.get("task")
        if isinstance(name, str):
            found[name] = config
    return found


def _read_task(file: Path) -> dict[str, Any]:
    import yaml

    loader: Any = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda reader, node: reader.construct_scalar(node))
    config: dict[str, Any] = yaml.load(file.read_text(encoding="utf-8"), Loader=loader)
    included = config.pop("include", None)
    return config if included is None else {**_read_task(file.parent / included), **config}


def own_task_names() -> tuple[str, ...]:
    """Names of our tasks and groups, sorted."""
    return tuple(sorted(_own_tasks()))


def needs_code_execution(task_names: Iterable[str]) -> bool:
    """Whether any of these tasks, groups or patterns (`soka_mbpp*`) runs programs that the model writes.

    Names that are not ours are looked up in lm-eval's index.

    Raises:
        EvalError: a name that neither of the two knows, or one of lm-eval's while lm-eval is not installed.
    """
    own = _own_tasks()
    foreign: list[str] = []
    unsafe = False
    for name in task_names:
        matched = [other for other in own if fnmatchcase(other, name)]
        if not matched:
            foreign.append(name)
        unsafe = unsafe or any(_runs_code(other, own) for other in matched)
    return unsafe or (bool(foreign) and _foreign_runs_code(foreign))


def _runs_code(name: str, tasks: Mapping[str, Mapping[str, Any]]) -> bool:
    config = tasks.get(name, {})
    members = config.get("task")
    if isinstance(members, list):
        names = [m if isinstance(m, str) else m.get("task", m.get("group", "")) for m in members]
        return any(_runs_code(member, tasks) for member in names)
    return bool(config.get("unsafe_code", False))


@cache
def lm_eval_manager(*, foreign: bool) -> Any:
    """lm-eval's TaskManager with our tasks; `foreign`: with its own too.

    Raises:
        ImportError: lm-eval is not installed.
    """
    from lm_eval.tasks import TaskManager

    if foreign:
        logger.info("reading lm-eval's tasks: some 15,000, which takes 10 seconds to a minute")
    return TaskManager(include_path=str(tasks_directory()), include_defaults=foreign)


def _foreign_runs_code(names: Iterable[str]) -> bool:
    try:
        index = lm_eval_manager(foreign=True).task_index
    except ImportError:
        raise EvalError(
            f"{', '.join(names)}: not tasks of soka-serve, and lm-eval is not installed to know others",
            hint=install_extra("eval"),
        ) from None
    known: dict[str, Mapping[str, Any]] = {name: entry.cfg or {} for name, entry in index.items()}
    members = {name: sorted(entry.tags) for name, entry in index.items() if entry.kind.name == "TAG"}
    unsafe = False
    for name in names:
        matched = [other for other in known if fnmatchcase(other, name)]
        if not matched:
            raise EvalError(
                f"{name}: no such task; ours are {', '.join(own_task_names())}", hint="lm_eval ls tasks lists the rest."
            )
        wanted = [task for other in matched for task in members.get(other, [other])]
        unsafe = unsafe or any(_runs_code(task, known) for task in wanted)
    return unsafe


def default_tasks(manifest: Manifest) -> tuple[str, ...]:
    """The tasks that a manifest is measured on: `[eval] tasks`, else the builtin families it trains on, else none."""
    if manifest.eval.tasks:
        return manifest.eval.tasks
    families = dict.fromkeys((data.builtin or "").removesuffix("-easy") for data in manifest.train.datasets)
    return tuple(f"soka_builtin_{family}" for family in families if family in TARGET_FAMILIES)
