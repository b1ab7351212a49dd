"""Word problems with worked steps that end in `#### n`, after GSM8K. No torch.

The easy variety is one change ("Tom has 23 apples. Tom buys 14 more."), the target one is two in a row. Both are put
together from the same clauses, so that the words are known and only the composition is new.
"""

from __future__ import annotations

from random import Random

from soka_serve.builtin.problem import (
    LARGEST,
    Draft,
    Problem,
    Step,
    draw_change,
    draw_difference,
    draw_product,
    draw_sum,
    one_step_reaches,
)

NAMES = ("Tom", "Ann", "Ben", "Mia", "Sam", "Eva", "Leo", "Zoe", "Max", "Ida", "Kim", "Raj")
ITEMS = ("apples", "pens", "books", "coins", "cards", "eggs", "cups", "stamps", "shells", "nuts", "keys", "balls")

_STARTS = ("{n} has {a} {i}.", "{n} had {a} {i}.", "There are {a} {i} in the box of {n}.", "{n} starts with {a} {i}.")
_PRODUCTS = (
    "{n} has {a} boxes with {b} {i} each.",
    "{n} buys {a} bags with {b} {i} each.",
    "There are {b} {i} in each box, and {n} has {a} boxes.",
    "{n} makes {b} {i} a day for {a} days.",
)
_MORE = ("{n} buys {b} more.", "{n} finds {b} more.", "{m} gives {n} {b} more.", "{n} gets {b} from {m}.")
_FEWER = ("{n} loses {b}.", "{n} gives {b} to {m}.", "{m} takes {b} away.", "{n} sells {b} of the {i}.")
_QUESTIONS = (
    "How many {i} does {n} have?",
    "How many {i} does {n} have now?",
    "How many {i} are there in the end?",
)
_TOGETHER = "How many {i} do they have together?"


def _change(rng: Random, step: Step) -> str:
    clause = rng.choice(_MORE if step.operator == "+" else _FEWER)
    if rng.random() < 0.5 and clause.startswith("{"):
        clause = "Then " + clause
    return clause.replace("{b}", str(step.second))


def _problem(family: str, text: str, steps: tuple[Step, ...], rng: Random) -> Problem:
    name, other = rng.sample(NAMES, 2)
    item = rng.choice(ITEMS)
    question = text.format(n=name, m=other, i=item)
    lines = [f"{step.render()} {item}." for step in steps]
    answer = str(steps[-1].result)
    completion = " " + "\n".join([*lines, f"#### {answer}"])
    return Problem(family, f"Question: {question}\nAnswer:", completion, answer)


def draw_easy(rng: Random) -> Draft:
    """One operation. Its key is the whole prompt: there are few one-digit products, and the base needs all of them."""
    kind = rng.random()
    if kind < 0.25:
        step = draw_product(rng)
        text = f"{rng.choice(_PRODUCTS)} {rng.choice(_QUESTIONS)}"
        text = text.replace("{a}", str(step.first)).replace("{b}", str(step.second))
    elif kind < 0.4:
        step = draw_sum(rng)
        text = f"{{n}} has {step.first} {{i}}. {{m}} has {step.second} {{i}}. {_TOGETHER}"
    elif kind < 0.5:
        step = draw_sum(rng) if rng.random() < 0.5 else draw_difference(rng)
        word = "more" if step.operator == "+" else "fewer"
        text = f"{{n}} has {step.first} {{i}}. {{m}} has {step.second} {word}. How many {{i}} does {{m}} have?"
    else:
        step = draw_sum(rng) if rng.random() < 0.5 else draw_difference(rng)
        start = rng.choice(_STARTS).replace("{a}", str(step.first))
        text = f"{start} {_change(rng, step)} {rng.choice(_QUESTIONS)}"
    problem = _problem("math-easy", text, (step,), rng)
    return Draft(problem.prompt, problem)


def draw_target(rng: Random) -> Draft | None:
    """Two operations in a row. Its key is the arithmetic: that of a test problem never occurs in training."""
    kind = rng.random()
    if kind < 0.2:
        first = draw_sum(rng) if rng.random() < 0.5 else draw_difference(rng)
        second = Step(first.first, "+", first.result)
        word = "more" if first.operator == "+" else "fewer"
        text = f"{{n}} has {first.first} {{i}}. {{m}} has {first.second} {word}. {_TOGETHER}"
        numbers = [first.first, first.second]
    else:
        if kind < 0.45:
            first = draw_product(rng)
            start = rng.choice(_PRODUCTS).replace("{a}", str(first.first)).replace("{b}", str(first.second))
        else:
            first = draw_sum(rng) if rng.random() < 0.5 else draw_difference(rng)
            start = f"{rng.choice(_STARTS).replace('{a}', str(first.first))} {_change(rng, first)}"
        change = draw_change(rng, first.result)
        if change is None:
            return None
        second = change
        text = f"{start} {_change(rng, second)} {rng.choice(_QUESTIONS)}"
        numbers = [first.first, first.second, second.second]
    if second.result > LARGEST or one_step_reaches(numbers, second.result):
        return None
    key = f"{first.render()}; {second.render()}"
    return Draft(key, _problem("math", text, (first, second), rng))
