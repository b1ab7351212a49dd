"""Small Python functions described in words, with asserts, after MBPP. No torch.

The easy variety does one thing to its argument, the target one two things in a row. The prompt shows one assert; two
more are kept for checking, so that a function which only fits the shown one fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from soka_serve.builtin.problem import Draft, Problem

NAMES = ("change", "update", "convert", "solve", "compute", "find", "apply", "adjust", "measure", "score")
NUMBER_ARGUMENTS = ("x", "n", "number", "value")
LIST_ARGUMENTS = ("items", "numbers", "values", "data")
TESTS = 3


@dataclass(frozen=True)
class _Action:
    """One thing done to a number: `words` after "that", `code` for the line, `run` for the asserts."""

    words: str
    code: str
    run: Callable[[int], int]


def _number_action(rng: Random) -> _Action:
    """An action with its constant; `{v}` stands for the variable, `{o}` for how the words call it."""
    k = rng.randint(2, 20)
    kind = rng.randrange(7)
    if kind == 0:
        return _Action(rng.choice((f"adds {k} to {{o}}", f"increases {{o}} by {k}")), f"{{v}} + {k}", lambda x: x + k)
    if kind == 1:
        words = rng.choice((f"subtracts {k} from {{o}}", f"decreases {{o}} by {k}"))
        return _Action(words, f"{{v}} - {k}", lambda x: x - k)
    if kind == 2:
        return _Action(f"multiplies {{o}} by {k}", f"{{v}} * {k}", lambda x: x * k)
    if kind == 3:
        return _Action(f"takes the remainder of {{o}} by {k}", f"{{v}} % {k}", lambda x: x % k)
    if kind == 4:
        return _Action(f"divides {{o}} by {k}", f"{{v}} // {k}", lambda x: x // k)
    if kind == 5:
        return _Action(f"takes the larger of {{o}} and {k}", f"max({{v}}, {k})", lambda x: max(x, k))
    return _Action(f"takes the smaller of {{o}} and {k}", f"min({{v}}, {k})", lambda x: min(x, k))


@dataclass(frozen=True)
class _ListAction:
    """One thing that makes a number of a list."""

    words: str
    code: str
    run: Callable[[list[int]], int]


_LIST_ACTIONS = (
    _ListAction("takes the sum of {a}", "sum({a})", sum),
    _ListAction("adds up {a}", "sum({a})", sum),
    _ListAction("counts {a}", "len({a})", len),
    _ListAction("takes the largest of {a}", "max({a})", max),
    _ListAction("takes the smallest of {a}", "min({a})", min),
)


def _assemble(
    family: str,
    rng: Random,
    argument: str,
    words: list[str],
    lines: list[str],
    calls: list[tuple[object, int]],
) -> Problem:
    name = rng.choice(NAMES)
    tests = tuple(f"assert {name}({given!r}) == {result}" for given, result in calls)
    task = " and then ".join(words)
    prompt = f'"""\nWrite a function {name}({argument}) that {task}.\n{tests[0]}\n"""\n'
    # The variable that is returned is the one that the last line assigns.
    variable = lines[-1].split(" = ", maxsplit=1)[0]
    body = "".join(f"    {line}\n" for line in [*lines, f"return {variable}"])
    completion = f"def {name}({argument}):\n{body}"
    return Problem(family, prompt, completion.rstrip("\n"), completion.rstrip("\n"), tests)


def _list_input(rng: Random) -> list[int]:
    return [rng.randint(1, 20) for _ in range(rng.randint(2, 4))]


def draw_easy(rng: Random) -> Draft:
    """One action. Its key is the whole prompt: functions of one action are few, and the base needs all of them."""
    if rng.random() < 0.35:
        action = rng.choice(_LIST_ACTIONS)
        argument = rng.choice(LIST_ARGUMENTS)
        given = [_list_input(rng) for _ in range(TESTS)]
        words, line = action.words.format(a=argument), f"x = {action.code.format(a=argument)}"
        problem = _assemble("code-easy", rng, argument, [words], [line], [(g, action.run(g)) for g in given])
        return Draft(problem.prompt, problem)
    number_action = _number_action(rng)
    argument = rng.choice(NUMBER_ARGUMENTS)
    numbers = [rng.randint(1, 60) for _ in range(TESTS)]
    words = number_action.words.format(o=argument)
    if rng.random() < 0.3:
        words = f"takes {argument} and then {number_action.words.format(o='it')}"
    line = f"{argument} = {number_action.code.format(v=argument)}"
    problem = _assemble("code-easy", rng, argument, [words], [line], [(g, number_action.run(g)) for g in numbers])
    return Draft(problem.prompt, problem)


def draw_target(rng: Random) -> Draft | None:
    """Two actions in a row. Its key is what the function does: that of a test problem never occurs in training."""
    last = _number_action(rng)
    calls: list[tuple[object, int]]
    halves: list[int]
    if rng.random() < 0.35:
        action = rng.choice(_LIST_ACTIONS)
        argument, variable = rng.choice(LIST_ARGUMENTS), "x"
        lists = [_list_input(rng) for _ in range(TESTS)]
        first_words, first_code = action.words.format(a=argument), action.code.format(a=argument)
        halves = [action.run(g) for g in lists]
        calls = [(g, last.run(h)) for g, h in zip(lists, halves, strict=True)]
        skipped = halves
        key = action.code.format(a="a")
    else:
        first = _number_action(rng)
        argument = variable = rng.choice(NUMBER_ARGUMENTS)
        numbers = [rng.randint(1, 60) for _ in range(TESTS)]
        first_words, first_code = first.words.format(o=argument), first.code.format(v=argument)
        halves = [first.run(g) for g in numbers]
        calls = [(g, last.run(h)) for g, h in zip(numbers, halves, strict=True)]
        skipped = [last.run(g) for g in numbers]
        key = first.code.format(v="a")
    results = [result for _, result in calls]
    if results in (halves, skipped):
        # One of the two actions changes nothing here: a function of one action would pass.
        return None
    lines = [f"{variable} = {first_code}", f"{variable} = {last.code.format(v=variable)}"]
    problem = _assemble("code", rng, argument, [first_words, last.words.format(o="it")], lines, calls)
    return Draft(f"{key}; {last.code.format(v='a')}", problem)
