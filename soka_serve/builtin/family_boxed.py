r"""Short algebra and arithmetic in TeX, answered in `\boxed{}`, after MATH. No torch."""

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

_TIMES = r"\cdot"
_LETTERS = ("x", "y", "n", "k", "t")
_ASKS = ("Compute ${e}$.", "What is ${e}$?", "Find the value of ${e}$.", "Evaluate ${e}$.", "Simplify ${e}$.")

_REORDERED_FRAC = 0.4
"""Share of reordered problems among those of any order."""


def _expression(step: Step) -> str:
    return step.render(_TIMES).split(" = ", maxsplit=1)[0]


def _tail(step: Step) -> str:
    """`+ 14`: the step without its first number."""
    return f"{_TIMES if step.operator == '*' else step.operator} {step.second}"


def _problem(family: str, question: str, steps: tuple[Step, ...]) -> Problem:
    answer = str(steps[-1].result)
    worked = " and ".join(f"${step.render(_TIMES)}$" for step in steps)
    completion = rf" {worked}, so the answer is $\boxed{{{answer}}}$."
    return Problem(family, f"Problem: {question}\nSolution:", completion, answer)


def _any_step(rng: Random) -> Step:
    return rng.choice((draw_sum, draw_sum, draw_difference, draw_difference, draw_product))(rng)


def draw_easy(rng: Random) -> Draft:
    """One operation. Its key is the whole prompt: there are few one-digit products, and the base needs all of them."""
    kind = rng.random()
    step = _any_step(rng)
    letter, other = rng.sample(_LETTERS, 2)
    if kind < 0.45:
        question = rng.choice(_ASKS).format(e=_expression(step))
    elif kind < 0.6:
        question = f"If ${letter} = {step.first}$, what is ${letter} {_tail(step)}$?"
    elif kind < 0.75:
        question = f"Let ${letter} = {step.first}$ and ${other} = {letter} {_tail(step)}$. Find ${other}$."
    else:
        step = draw_sum(rng) if rng.random() < 0.5 else draw_difference(rng)
        inverse = "-" if step.operator == "+" else "+"
        question = f"Solve ${letter} {inverse} {step.second} = {step.first}$ for ${letter}$."
    problem = _problem("boxed-easy", question, (step,))
    return Draft(problem.prompt, problem)


def draw_target(rng: Random) -> Draft | None:
    """Two operations in reading order. Its key is the arithmetic: that of a test problem never occurs in training."""
    return _draw_two_steps(rng, _REORDERED_FRAC + (1 - _REORDERED_FRAC) * rng.random())


def draw_any_two_steps(rng: Random) -> Draft | None:
    """Two operations in any order: also equations, and products that stand last but are worked first.

    Text for the vocabulary. No family asks for these, since 300 steps of a rank-1 adapter do not teach the base to
    reorder (8 of 41 and 0 of 20 held-out problems right, where those in reading order reach 137 of 139).
    """
    return _draw_two_steps(rng, rng.random())


def _draw_two_steps(rng: Random, kind: float) -> Draft | None:
    """A problem of the kind that a number from 0 to 1 stands for."""
    first = _any_step(rng)
    letter, other = rng.sample(_LETTERS, 2)
    if kind < 0.2:
        # Precedence: the product is worked first, wherever it stands.
        first = draw_product(rng)
        second = Step(rng.randint(2, LARGEST), "+", first.result)
        question = rng.choice(_ASKS).format(e=f"{second.first} + {_expression(first)}")
        numbers = [first.first, first.second, second.first]
    elif kind < _REORDERED_FRAC:
        first = draw_sum(rng) if rng.random() < 0.5 else draw_difference(rng)
        inverse = rng.choice("+-")
        second = Step(first.result, "-" if inverse == "+" else "+", rng.randint(2, LARGEST))
        question = f"Solve ${letter} {inverse} {second.second} = {_expression(first)}$ for ${letter}$."
        numbers = [first.first, first.second, second.second]
    else:
        change = draw_change(rng, first.result)
        if change is None:
            return None
        second = change
        numbers = [first.first, first.second, second.second]
        if kind < 0.7:
            question = rng.choice(_ASKS).format(e=f"{_expression(first)} {_tail(second)}")
        else:
            given = f"${letter} = {first.first}$ and ${other} = {letter} {_tail(first)}$"
            question = rng.choice(
                (
                    f"If {given}, what is ${other} {_tail(second)}$?",
                    f"Let {given}. Find ${other} {_tail(second)}$.",
                )
            )
    if not 2 <= second.result <= LARGEST or one_step_reaches(numbers, second.result):
        return None
    key = f"{first.render()}; {second.render()}"
    return Draft(key, _problem("boxed", question, (first, second)))
