"""The task families: splits, determinism, checking."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soka_serve.builtin import tasks
from soka_serve.builtin.problem import Draft, Problem, Step, one_step_reaches
from soka_serve.builtin.tasks import (
    EASY_FAMILIES,
    FAMILIES,
    TARGET_FAMILIES,
    check_answer,
    draw_problems,
    extract_boxed,
    extract_hashes,
    generate,
    generate_validation,
)

NUMBER = re.compile(r"\d+")


def _substance(problem: Problem) -> str:
    """What a target problem asks, without names, items and wording: its arithmetic, or what its function does."""
    if problem.family == "code":
        argument = problem.completion.split("(", maxsplit=1)[1].split(")", maxsplit=1)[0]
        body = problem.completion.split("\n", maxsplit=1)[1]
        return re.sub(rf"\b({argument}|x)\b", "a", body)
    return " ; ".join(re.findall(r"\d+ \S+ \d+ = \d+", problem.completion))


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_are_disjoint_whatever_the_seeds(family: str) -> None:
    train = {p.prompt for seed in range(4) for p in generate(family, "train", 1500, seed)}
    test = {p.prompt for seed in range(4) for p in generate(family, "test", 300, seed)}
    assert len(test) > 300
    assert not train & test


@pytest.mark.parametrize("family", TARGET_FAMILIES)
def test_a_target_test_problem_repeats_no_training_problem_in_other_words(family: str) -> None:
    train = {_substance(p) for p in generate(family, "train", 6000, seed=1)}
    test = {_substance(p) for p in generate(family, "test", 500)}
    assert len(train) > 2000
    assert len(test) > 200
    assert not train & test


def test_no_problem_belongs_to_two_families() -> None:
    prompts = [p.prompt for family in FAMILIES for split in ("train", "test") for p in generate(family, split, 500)]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_deterministic_and_counts_give_prefixes(family: str) -> None:
    assert generate(family, "train", 50) == generate(family, "train", 200)[:50]
    assert generate(family, "train", 50) != generate(family, "train", 50, seed=1)
    assert len(generate(family, "test")) == 500


def test_generation_does_not_depend_on_the_process() -> None:
    code = "from soka_serve.builtin.tasks import generate; print(generate('math', 'test', 20)[-1].prompt)"
    for hash_seed in ("0", "7"):
        result = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=True
        )
        assert result.stdout.rstrip("\n") == generate("math", "test", 20)[-1].prompt


@pytest.mark.parametrize("family", FAMILIES)
def test_two_thousand_problems_take_well_under_a_second(family: str) -> None:
    started = time.process_time()
    generate(family, "train", 2000)
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_completion_have_the_promised_form(family: str) -> None:
    for problem in generate(family, "test", 200):
        assert problem.family == family
        if family.startswith("code"):
            assert problem.prompt.startswith('"""\nWrite a function ')
            assert problem.tests[0] in problem.prompt
            assert len(problem.tests) == 3
            assert problem.completion.startswith("def ")
        else:
            start, end = ("Question: ", "\nAnswer:") if family.startswith("math") else ("Problem: ", "\nSolution:")
            assert problem.prompt.startswith(start)
            assert problem.prompt.endswith(end)
            assert problem.completion.startswith(" ")
            assert not problem.tests
            assert all(1 <= int(n) <= 99 for n in NUMBER.findall(problem.prompt + problem.completion))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_more_than_one_template(family: str) -> None:
    words = {" ".join(sorted(set(re.sub(r"\d+", "0", p.prompt).split()))) for p in generate(family, "train", 500)}
    assert len(words) > 30


@pytest.mark.parametrize("family", ["math", "boxed"])
def test_one_operation_never_answers_a_target_problem(family: str) -> None:
    for problem in generate(family, "test", 300):
        numbers = [int(n) for n in NUMBER.findall(problem.prompt)]
        assert not one_step_reaches(numbers, int(problem.answer)), problem


def test_one_action_never_passes_a_target_function() -> None:
    for problem in generate("code", "test", 300):
        lines = problem.completion.split("\n")
        without_last = "\n".join([*lines[:2], *lines[3:]])
        assert not check_answer(problem, without_last), problem


@pytest.mark.parametrize("family", FAMILIES)
def test_gold_answers_are_right_and_corrupted_ones_wrong(family: str) -> None:
    for problem in generate(family, "test", 200):
        assert check_answer(problem, problem.completion), problem
        assert check_answer(problem, problem.completion + "\n"), problem
        assert not check_answer(problem, ""), problem
        assert not check_answer(problem, problem.completion[: len(problem.completion) // 3]), problem
        if family.startswith("code"):
            argument = problem.completion.split("return ")[-1]
            assert not check_answer(problem, problem.completion + " + 1"), problem
            assert not check_answer(problem, problem.completion.replace(f"return {argument}", "return None")), problem
        else:
            head, _, tail = problem.completion.rpartition(problem.answer)
            assert not check_answer(problem, f"{head}{int(problem.answer) + 1}{tail}"), problem
            assert not check_answer(problem, head + tail), problem


def test_what_comes_after_the_first_answer_does_not_count() -> None:
    math, boxed, code = (generate(family, "test", 1)[0] for family in TARGET_FAMILIES)
    assert check_answer(math, math.completion + "\nQuestion: more\nAnswer: #### 1000")
    assert not check_answer(math, " #### 1000\n" + math.completion)
    assert check_answer(boxed, boxed.completion + r" $\boxed{1000}$")
    assert not check_answer(boxed, r"$\boxed{1000}$ " + boxed.completion)
    assert check_answer(code, code.completion + '\n"""\nWrite a function that\ndef f(x):\n    return 1')
    assert not check_answer(code, "def f(x):\n    return 1\n" + code.completion)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#### 12", "12"),
        ("so\n####12 apples", "12"),
        ("#### 1,234", "1234"),
        ("#### $18", "18"),
        ("#### -3", "-3"),
        ("#### 2.50", "2.50"),
        ("####", None),
        ("#### none #### 5", None),
        ("12", None),
    ],
)
def test_the_number_after_the_hashes(text: str, expected: str | None) -> None:
    assert extract_hashes(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{12}", "12"),
        (r"so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{1} \boxed{2}", "1"),
        (r"\boxed{1", None),
        ("1", None),
    ],
)
def test_the_content_of_the_box(text: str, expected: str | None) -> None:
    assert extract_boxed(text) == expected


@settings(deadline=None)
@given(st.sampled_from(FAMILIES), st.text(max_size=300))
def test_any_text_is_judged_without_an_exception(family: str, text: str) -> None:
    problem = generate(family, "test", 1)[0]
    assert check_answer(problem, text) in (True, False)


def test_unknown_names_and_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown task family 'maths'"):
        generate("maths", "train", 1)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        generate("math", "dev", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a count from 0"):
        generate("math", "train", -1)
    assert generate("math", "train", 0) == []


def test_a_family_that_runs_dry_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = generate("math", "train", 1)[0]
    monkeypatch.setattr(tasks, "_DRAW", {"math": lambda rng: Draft("0", problem)})
    split = tasks.split_of("0")
    assert generate("math", split, 1) == [problem]
    with pytest.raises(ValueError, match=f"math has too few different {split} problems for a count of 2"):
        generate("math", split, 2)


@pytest.mark.parametrize("family", TARGET_FAMILIES)
def test_validation_problems_share_nothing_with_the_test_problems(family: str) -> None:
    chosen = generate_validation(family, 60, 200)
    measured = {_substance(problem) for problem in generate(family, "test", 200)}
    assert len({problem.prompt for problem in chosen}) == 60
    assert not measured & {_substance(problem) for problem in chosen}
    trained = {_substance(problem) for problem in generate(family, "train", 500)}
    assert not trained & {_substance(problem) for problem in chosen}
    assert generate_validation(family, 10, 200) == chosen[:10]


def test_draws_are_lazy_and_endless() -> None:
    problems = draw_problems("math-easy", "train")
    assert [next(problems).family for _ in range(3)] == ["math-easy"] * 3
    assert set(EASY_FAMILIES) | set(TARGET_FAMILIES) == set(FAMILIES)


def test_steps_render_with_either_sign_of_multiplication() -> None:
    assert Step(4, "*", 6).render() == "4 * 6 = 24"
    assert Step(4, "*", 6).render(r"\cdot") == r"4 \cdot 6 = 24"
    assert Step(9, "-", 6).result == 3
