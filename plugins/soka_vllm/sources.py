"""What vLLM's functions look like, read from its sources: a folder or a wheel. Imports nothing of vLLM.

For versions that the plugin does not know (they are compared before anything of them runs), and for wheels that cannot
be installed where they are looked at.
"""

from __future__ import annotations

import ast
import importlib.util
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from soka_vllm.checks import ATTRIBUTES, CLASSES, LORA_LAYERS, Signature, differs

_Function = ast.FunctionDef | ast.AsyncFunctionDef


class _Place(NamedTuple):
    """A definition, and the module that it is in."""

    module: str
    node: ast.AST


class Sources:
    """Definitions in a package's sources.

    Args:
        read: the text of a file by its path in the package's parent folder, "vllm/lora/utils.py"; None without one.
    """

    def __init__(self, read: Callable[[str], str | None]) -> None:
        self._read = read
        self._module = cache(self._parse)

    def has(self, module: str, name: str) -> bool:
        """Whether a module defines or imports a name; "" is the module itself."""
        if not name:
            return self._module(module) is not None
        made = self._find(module, "__getattr__")  # makes names when they are asked for
        constants = {node.value for node in ast.walk(made.node) if isinstance(node, ast.Constant)} if made else set()
        return name in constants or self._find(module, name) is not None or self.has(f"{module}.{name}", "")

    def parameters(self, module: str, name: str) -> str | None:
        """Names of the parameters of a function or Class.method, as `inspect.signature` has them; None without one."""
        place = self._find(module, name)
        if place is None or not isinstance(place.node, _Function):
            return None
        found = place.node.args
        names = [*found.posonlyargs, *found.args, found.vararg, *found.kwonlyargs, found.kwarg]
        bound = any(isinstance(d, ast.Name) and d.id == "classmethod" for d in place.node.decorator_list)
        return " ".join([argument.arg for argument in names if argument is not None][bound:])

    def attributes(self, module: str, name: str) -> set[str]:
        """Names of the attributes that a function mentions."""
        place = self._find(module, name)
        return {node.attr for node in ast.walk(place.node) if isinstance(node, ast.Attribute)} if place else set()

    def assigned(self, module: str, name: str, call: str) -> set[str]:
        """Names of the attributes to which a function assigns what a call of this name returns."""
        place = self._find(module, name)
        made = [
            node
            for node in (ast.walk(place.node) if place else ())
            if isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and ast.unparse(node.value.func).rpartition(".")[2] == call
        ]
        return {target.attr for node in made for target in node.targets if isinstance(target, ast.Attribute)}

    def fields(self, module: str, name: str) -> list[str]:
        """Names of a dataclass's fields."""
        place = self._find(module, name)
        body = place.node.body if place is not None and isinstance(place.node, ast.ClassDef) else []
        return [s.target.id for s in body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)]

    def elements(self, module: str, name: str) -> list[str] | None:
        """The names in a tuple; None where there is no tuple."""
        place = self._find(module, name)
        if place is None or not isinstance(place.node, ast.Tuple):
            return None
        return [element.id for element in place.node.elts if isinstance(element, ast.Name)]

    def constant(self, module: str, name: str) -> str | None:
        """The text that a name stands for; None where it stands for none."""
        place = self._find(module, name)
        value = place.node.value if place is not None and isinstance(place.node, ast.Constant) else None
        return value if isinstance(value, str) else None

    def _parse(self, module: str) -> tuple[ast.Module, bool] | None:
        """A module's tree, and whether it is a package."""
        path = module.replace(".", "/")
        for file, is_package in ((f"{path}.py", False), (f"{path}/__init__.py", True)):
            text = self._read(file)
            if text is not None:
                return ast.parse(text), is_package
        return None

    def _find(self, module: str, name: str, seen: frozenset[tuple[str, str]] = frozenset()) -> _Place | None:
        """The definition of a dotted name as a module has it, through imports, assignments and base classes."""
        if (module, name) in seen or self._module(module) is None:
            return None
        seen |= {(module, name)}
        first, _, rest = name.partition(".")
        place = self._in_module(module, first, seen)
        while place is not None and rest:
            first, _, rest = rest.partition(".")
            place = self._in_class(place, first, seen) if isinstance(place.node, ast.ClassDef) else None
        return place

    def _in_module(self, module: str, name: str, seen: frozenset[tuple[str, str]]) -> _Place | None:
        parsed = self._module(module)
        assert parsed is not None
        for node in _definitions(parsed[0].body, name):  # the last one that leads somewhere
            if not isinstance(node, ast.ImportFrom):
                return self._value(_Place(module, node), seen)
            parts = module.split(".")
            parts = parts[: len(parts) - node.level + parsed[1]] if node.level else []
            target = ".".join([*parts, *([node.module] if node.module else [])])
            names = {alias.asname or alias.name: alias.name for alias in node.names}
            found = self._find(target, names.get(name, name), seen)  # the latter of `import *`
            if found is not None:
                return found
        return None

    def _in_class(self, place: _Place, name: str, seen: frozenset[tuple[str, str]]) -> _Place | None:
        assert isinstance(place.node, ast.ClassDef)
        for node in _definitions(place.node.body, name):
            return self._value(_Place(place.module, node), seen)
        for base in place.node.bases:
            whole = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
            found = self._find(place.module, f"{whole}.{name}", seen)
            if found is not None:
                return found
        return None

    def _value(self, place: _Place, seen: frozenset[tuple[str, str]]) -> _Place | None:
        """What a definition stands for: an assignment of a name for what that name stands for."""
        value = place.node.value if isinstance(place.node, ast.Assign | ast.AnnAssign) else None
        if isinstance(value, ast.Name | ast.Attribute):
            return self._find(place.module, ast.unparse(value), seen)
        return place if value is None else _Place(place.module, value)


def folder_sources(folder: Path) -> Sources:
    """Of packages in a folder."""

    def read(path: str) -> str | None:
        file = folder / path
        return file.read_text(encoding="utf-8") if file.is_file() else None

    return Sources(read)


def wheel_sources(wheel: Path) -> Sources:
    """Of a wheel, which is not unpacked."""
    archive = zipfile.ZipFile(wheel)
    names = set(archive.namelist())
    return Sources(lambda path: archive.read(path).decode() if path in names else None)


def installed_sources() -> Sources:
    """Of the installed vLLM, which is not imported.

    Raises:
        RuntimeError: there is none.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("vLLM is not installed")
    return folder_sources(Path(next(iter(spec.submodule_search_locations))).parent)


def version_of(sources: Sources) -> str:
    """The version that a built vLLM names itself.

    Raises:
        RuntimeError: it was not built: a copy of the repository has no such file.
    """
    named = sources.constant("vllm._version", "version")
    if named is None:
        raise RuntimeError("vllm/_version.py names no version; give a wheel, or what is unpacked from one")
    return named


def source_problems(sources: Sources, signatures: Iterable[Signature]) -> list[str]:
    """What the plugin uses and these sources do not have as it expects; empty where the plugin fits them."""
    problems = []
    for signature in filter(is_of_vllm, signatures):
        where = signature.module, signature.name
        there = "" if sources.has(*where) else None
        problems += differs(signature, there if signature.parameters is None else sources.parameters(*where))
    for module, (name, attributes) in ATTRIBUTES.items():
        missing = set(attributes) - sources.attributes(module, f"{name}.__init__")
        problems += [f"{name} has no {attribute}" for attribute in sorted(missing)]
    classes = sources.elements(*CLASSES)
    if classes is None:
        problems.append(f"{'.'.join(CLASSES)} is not a tuple of classes")
    else:
        problems += [f"{name} is not in {'.'.join(CLASSES)}" for name in LORA_LAYERS if name not in classes]
    wanted = imported_names(Path(__file__).parent)
    return problems + [f"{module} has no {name}" for module, name in wanted if not sources.has(module, name)]


def imported_names(folder: Path) -> list[tuple[str, str]]:
    """Modules of vLLM and names in them that Python files import; "" is the module itself."""
    found = set()
    for file in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found |= {(node.module, alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {(alias.name, "") for alias in node.names}
    return sorted((module, name) for module, name in found if _in_vllm(module))


def is_of_vllm(signature: Signature) -> bool:
    """Whether a function that the plugin uses is in vLLM's sources, not in what vLLM leaves something to."""
    return _in_vllm(signature.module)


def _in_vllm(module: str) -> bool:
    return module.partition(".")[0] == "vllm"


def _definitions(body: Iterable[ast.stmt], name: str) -> Iterator[ast.AST]:
    """The statements that define a name, last first; also within `if`, `try` and `with`."""
    for node in reversed(list(_statements(body))):
        if isinstance(node, _Function | ast.ClassDef):
            if node.name == name:
                yield node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if node.value is not None and any(isinstance(t, ast.Name) and t.id == name for t in targets):
                yield node
        elif isinstance(node, ast.ImportFrom):
            if {a.asname or a.name for a in node.names} & {name, "*"}:
                yield node
        elif isinstance(node, ast.Import) and name in {a.asname or a.name.partition(".")[0] for a in node.names}:
            yield node


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If | ast.Try | ast.With):
            parts = [node.body, getattr(node, "orelse", []), getattr(node, "finalbody", [])]
            parts += [handler.body for handler in getattr(node, "handlers", [])]
            for part in parts:
                yield from _statements(part)
        else:
            yield node
