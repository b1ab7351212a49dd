"""A small interpreter for functions that a model wrote. No torch.

Only whitelisted syntax is walked; nothing reaches exec, eval or an attribute. Work is bounded: characters, steps,
call depth, the size of numbers and of lists. Whatever is outside of that makes the answer wrong, never an exception
for the caller.

Understood: one `def` with plain arguments; return, assignment to a name, `+=` and its kin, if, for over a list or a
range, pass; whole numbers, strings, flat lists and tuples; `+ - * // %`, comparisons, and/or/not, `a if b else c`,
indexing; the builtins abs, len, max, min, range, sorted, sum; the function itself.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MAX_CHARACTERS = 4000
MAX_STEPS = 10_000
MAX_DEPTH = 16
MAX_NUMBER = 10**15
MAX_LENGTH = 1000

_SCALARS = (int, str, type(None))
_SEQUENCES = (list, tuple, str)

_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_UNARY: Mapping[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}


def _bounded_range(*bounds: int) -> list[int]:
    numbers = range(*bounds)
    if len(numbers) > MAX_LENGTH:
        raise _RefusedError(f"a range of more than {MAX_LENGTH}")
    return list(numbers)


_PLAIN: tuple[Callable[..., Any], ...] = (abs, len, max, min, sorted, sum)
_BUILTINS = {function.__name__: function for function in _PLAIN} | {"range": _bounded_range}


class _RefusedError(ValueError):
    """Syntax outside the whitelist, or a bound passed."""


class _ReturnedSignal(Exception):  # noqa: N818 - not an error, control flow
    """Carries a function's result out of its body."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value


def extract_function(text: str) -> str | None:
    """The first function in a text: its `def` line and the indented or empty lines after it; None without a def."""
    lines = text.strip("\n").splitlines()
    start = next((i for i, line in enumerate(lines) if line.strip().startswith("def ")), None)
    if start is None:
        return None
    end = start + 1
    while end < len(lines) and (not lines[end].strip() or lines[end][0] in " \t"):
        end += 1
    return "\n".join([lines[start].strip(), *lines[start + 1 : end]]) + "\n"


def passes(text: str, tests: Sequence[str]) -> bool:
    """Whether the first function in `text` passes every `assert EXPRESSION` of `tests`.

    False for anything that does not parse, leaves the whitelist, passes a bound or raises; also without tests.

    >>> passes("def f(x):\\n    return x + 1", ["assert f(1) == 2"])
    True
    >>> passes("def f(x):\\n    return __import__('os')", ["assert f(1) == 2"])
    False
    """
    source = extract_function(text[:MAX_CHARACTERS])
    if source is None or not tests:
        return False
    try:
        module = _parse(source)
        if len(module.body) != 1 or not isinstance(module.body[0], ast.FunctionDef):
            return False
        function = module.body[0]
        return all(_holds(function, test) for test in tests)
    except (SyntaxError, ArithmeticError, LookupError, TypeError, ValueError, MemoryError, RecursionError):
        return False


def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        # The parser warns of doubtful escapes and comparisons; they are the model's, not the user's.
        warnings.simplefilter("ignore")
        return ast.parse(source)


def _holds(function: ast.FunctionDef, test: str) -> bool:
    (statement,) = _parse(test).body
    if not isinstance(statement, ast.Assert):
        raise _RefusedError("a test is an assert")
    return bool(_Interpreter(function).evaluate(statement.test, {}))


class _Interpreter:
    """One run: the function that may be called, and the steps left."""

    def __init__(self, function: ast.FunctionDef) -> None:
        arguments = function.args
        plain = not (arguments.posonlyargs or arguments.kwonlyargs or arguments.vararg or arguments.kwarg)
        if not plain or arguments.defaults or function.decorator_list:
            raise _RefusedError("only plain arguments")
        self.function = function
        self.arguments = [argument.arg for argument in arguments.args]
        self.steps = 0
        self.depth = 0

    def spend(self, steps: int = 1) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise _RefusedError(f"more than {MAX_STEPS} steps")

    def check(self, value: Any) -> Any:
        """Let a value through when it is of a known type and within the bounds; a step per element."""
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise _RefusedError("a number too large")
        if isinstance(value, _SEQUENCES):
            if len(value) > MAX_LENGTH:
                raise _RefusedError("a value too long")
            self.spend(len(value))
            # Flat only: nested lists that share parts compare in exponential time.
            if not isinstance(value, str) and not all(isinstance(item, _SCALARS) for item in value):
                raise _RefusedError("a list in a list")
        elif not isinstance(value, _SCALARS):
            raise _RefusedError(f"a value of type {type(value).__name__}")
        return value

    def call(self, name: str, values: list[Any]) -> Any:
        if name == self.function.name:
            if len(values) != len(self.arguments):
                raise _RefusedError("wrong number of arguments")
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise _RefusedError(f"calls nested deeper than {MAX_DEPTH}")
            try:
                self.run(self.function.body, dict(zip(self.arguments, values, strict=True)))
            except _ReturnedSignal as result:
                return result.value
            finally:
                self.depth -= 1
            return None
        if name not in _BUILTINS:
            raise _RefusedError(f"call of {name}")
        for value in values:
            self.check(value)
        return self.check(_BUILTINS[name](*values))

    def run(self, body: Sequence[ast.stmt], names: dict[str, Any]) -> None:
        for statement in body:
            self.spend()
            match statement:
                case ast.Return(value=value):
                    raise _ReturnedSignal(None if value is None else self.evaluate(value, names))
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    names[name] = self.evaluate(value, names)
                case ast.AugAssign(target=ast.Name(id=name), op=op, value=value):
                    names[name] = self.binary(op, names[name], self.evaluate(value, names))
                case ast.If(test=test, body=then, orelse=otherwise):
                    self.run(then if self.evaluate(test, names) else otherwise, names)
                case ast.For(target=ast.Name(id=name), iter=iterable, body=inner, orelse=[]):
                    for item in self.sequence(self.evaluate(iterable, names)):
                        self.spend()
                        names[name] = item
                        self.run(inner, names)
                case ast.Pass() | ast.Expr(value=ast.Constant(value=str())):
                    pass
                case _:
                    raise _RefusedError(type(statement).__name__)

    def evaluate(self, node: ast.expr, names: Mapping[str, Any]) -> Any:
        self.spend()
        match node:
            case ast.Constant(value=value):
                return self.check(value)
            case ast.Name(id=name):
                return names[name]
            case ast.List(elts=items) | ast.Tuple(elts=items):
                values = [self.evaluate(item, names) for item in items]
                return self.check(values if isinstance(node, ast.List) else tuple(values))
            case ast.BinOp(left=left, op=op, right=right):
                return self.binary(op, self.evaluate(left, names), self.evaluate(right, names))
            case ast.UnaryOp(op=unary, operand=operand) if type(unary) in _UNARY:
                return self.check(_UNARY[type(unary)](self.evaluate(operand, names)))
            case ast.BoolOp(op=joint, values=parts):
                last: Any = None
                for part in parts:
                    last = self.evaluate(part, names)
                    if bool(last) == isinstance(joint, ast.Or):
                        break
                return last
            case ast.Compare(left=first, ops=ops, comparators=others):
                return self.compare(self.evaluate(first, names), ops, others, names)
            case ast.IfExp(test=test, body=then, orelse=otherwise):
                return self.evaluate(then if self.evaluate(test, names) else otherwise, names)
            case ast.Subscript(value=container, slice=index) if not isinstance(index, ast.Slice):
                return self.sequence(self.evaluate(container, names))[self.evaluate(index, names)]
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
                return self.call(name, [self.evaluate(argument, names) for argument in arguments])
            case _:
                raise _RefusedError(type(node).__name__)

    def compare(self, left: Any, ops: list[ast.cmpop], others: list[ast.expr], names: Mapping[str, Any]) -> bool:
        for op, other in zip(ops, others, strict=True):
            if type(op) not in _COMPARISONS:
                raise _RefusedError(type(op).__name__)
            right = self.evaluate(other, names)
            if isinstance(left, _SEQUENCES):
                self.spend(len(left))
            if isinstance(right, _SEQUENCES):
                self.spend(len(right))
            if not _COMPARISONS[type(op)](left, right):
                return False
            left = right
        return True

    def binary(self, op: ast.operator, left: Any, right: Any) -> Any:
        if type(op) not in _ARITHMETIC:
            raise _RefusedError(type(op).__name__)
        numbers = isinstance(left, int) and isinstance(right, int)
        joined = isinstance(op, ast.Add) and isinstance(left, _SEQUENCES) and isinstance(right, _SEQUENCES)
        # A sequence times a number, and formatting with %, would work before any bound is looked at.
        if not numbers and not joined:
            raise _RefusedError(f"{type(op).__name__} of {type(left).__name__} and {type(right).__name__}")
        return self.check(_ARITHMETIC[type(op)](left, right))

    @staticmethod
    def sequence(value: Any) -> Sequence[Any]:
        if not isinstance(value, _SEQUENCES):
            raise _RefusedError(f"not a sequence: {type(value).__name__}")
        return value
