"""The OpenAI client against a real server: its features, many requests at once, and adapters replaced in traffic.

The server is small on purpose: four slots for sixteen adapters of all kinds, prompts cut into chunks of 64 tokens, and
blocks of 32 tokens in the prefix cache, so that each of these is at work in every test.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from openai import OpenAI
from transformers import AutoTokenizer

from soka_serve.builtin import base_directory
from soka_serve.builtin.tasks import generate
from tests.support.serve_adapters import (
    ALPHA,
    ATOL_NATS,
    TARGET_OPTIONS,
    clear_jobs,
    expected_answers,
    write_many,
    write_soka,
)
from tests.support.serving import Server, greedy_logprobs, random_factors, serve

pytestmark = pytest.mark.slow

ADAPTERS = 16
SOME = ["base", "a0", "a1", "a3", "a4"]  # the base, two SoKA adapters, a LoRA and a LoKr
TOKENS = 12
LONG = 500
LONGEST = 1000  # with a prompt of 20, nearly all of the context: still running after everything else in a test
GREEDY: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0}
TO_THE_END = {"ignore_eos": True, "return_token_ids": True, "skip_special_tokens": False}


@dataclass
class ApiServer:
    """The server, a client of it, the reference of each name, and a folder for more adapters."""

    server: Server
    client: OpenAI
    references: dict[str, Any]
    tokenizer: Any
    folder: Path

    def ask(self, name: str, prompt: list[int], tokens: int = TOKENS) -> list[int]:
        reply = self.client.completions.create(
            model=name, prompt=prompt, max_tokens=tokens, temperature=0, extra_body=TO_THE_END
        )
        return reply.choices[0].token_ids  # type: ignore[attr-defined, no-any-return]

    def check_at_once(self, jobs: list[tuple[str, list[int], list[int]]], connections: int) -> None:
        """Send (name, prompt, answer) jobs together; every one must come back with its answer."""
        with ThreadPoolExecutor(connections) as pool:
            got = list(pool.map(lambda job: self.ask(job[0], job[1], len(job[2])), jobs))
        wrong = [(i, job[0]) for i, (job, tokens) in enumerate(zip(jobs, got, strict=True)) if tokens != job[2]]
        assert not wrong, f"{len(wrong)} of {len(jobs)} answers are wrong: {wrong[:20]}"

    def load(self, name: str, path: Path, **more: Any) -> None:
        status, reply = self.server.load(name, path, **more)
        assert status == 200, reply

    def text_jobs(self, render: Callable[[str], list[int]]) -> list[tuple[str, str, list[int], str]]:
        """A question for each of SOME that it answers otherwise than the base does: (name, question, prompt, text)."""
        jobs = []
        for at, name in enumerate(SOME):
            for problem in generate("math", "test", 100)[10 * at :]:
                question = problem.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
                prompt = render(question)
                (answer,), (lead,) = expected_answers(self.references[name], torch.tensor([prompt]), TOKENS)
                plain, _ = expected_answers(self.references["base"], torch.tensor([prompt]), TOKENS)
                text = self.tokenizer.decode(answer)
                differs = name == "base" or answer.tolist() != plain[0].tolist()
                # A token may be half a character, which a stream holds back.
                if lead > 10 * ATOL_NATS and differs and "\ufffd" not in text:
                    jobs.append((name, question, prompt, text))
                    break
        assert [job[0] for job in jobs] == SOME
        return jobs

    def plain(self, question: str) -> list[int]:
        return self.tokenizer(f"Question: {question}\nAnswer:")["input_ids"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    folder = tmp_path_factory.mktemp("api")
    references = write_many(folder, ADAPTERS)
    options = [*TARGET_OPTIONS, "--max-loras", "4", "--max-cpu-loras", "20", "--max-lora-rank", "8"]
    options += ["--max-model-len", "1024", "--max-num-batched-tokens", "64", "--block-size", "32"]
    options += ["--enable-prefix-caching", "--enable-chunked-prefill"]
    options += ["--lora-modules", *(f"{name}={folder / name}" for name in references if name != "base")]
    with serve(folder, options) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300, max_retries=0)
        yield ApiServer(server, client, references, AutoTokenizer.from_pretrained(base_directory()), folder)


def test_models_are_listed(served: ApiServer) -> None:
    cards = {card.id: card for card in served.client.models.list()}
    assert set(cards) == set(served.references)
    assert cards["a0"].parent == "base"  # type: ignore[attr-defined]


def test_streamed_text_is_the_unstreamed(served: ApiServer) -> None:
    for name, _, prompt, text in served.text_jobs(served.plain):
        ask: dict[str, Any] = {"model": name, "prompt": prompt, **GREEDY, "extra_body": TO_THE_END}
        assert served.client.completions.create(**ask).choices[0].text == text, name
        pieces = [chunk.choices[0].text for chunk in served.client.completions.create(**ask, stream=True)]
        assert "".join(pieces) == text, name
        assert len(pieces) > 3


def test_chat(served: ApiServer) -> None:
    """With the template of the base's tokenizer, streamed and not."""

    def messages(question: str) -> list[Any]:
        return [{"role": "system", "content": "Count."}, {"role": "user", "content": question}]

    def render(question: str) -> list[int]:
        return served.tokenizer.apply_chat_template(messages(question), add_generation_prompt=True)["input_ids"]  # type: ignore[no-any-return]

    for name, question, prompt, text in served.text_jobs(render):
        ask: dict[str, Any] = {"model": name, "messages": messages(question), **GREEDY, "extra_body": TO_THE_END}
        reply = served.client.chat.completions.create(**ask)
        assert reply.usage.prompt_tokens == len(prompt)
        assert reply.choices[0].message.content == text, name
        chunks = served.client.chat.completions.create(**ask, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text, name


def test_several_samples(served: ApiServer) -> None:
    """With a seed n samples are the same again, differ among themselves, and have the reference's probabilities."""
    # Short enough for all four in one step: vLLM's CPU build dies of a seeded request whose prompt is cut into chunks.
    prompt = [1, *range(60, 72)]
    for name in SOME:
        ask: dict[str, Any] = {"model": name, "prompt": prompt, "n": 4, "seed": 5, "temperature": 1.0, "logprobs": 1}
        first, again = (
            served.client.completions.create(**ask, max_tokens=TOKENS, extra_body=TO_THE_END).choices for _ in range(2)
        )
        tokens = [choice.token_ids for choice in first]  # type: ignore[attr-defined]
        assert tokens == [choice.token_ids for choice in again]  # type: ignore[attr-defined]
        assert len({tuple(sample) for sample in tokens}) > 1, name
        for choice, sample in zip(first, tokens, strict=True):
            want = greedy_logprobs(served.references[name], prompt, sample).gather(1, torch.tensor(sample)[:, None])
            got = torch.tensor(choice.logprobs.token_logprobs, dtype=torch.float64)[:, None]
            assert float((want - got).abs().max()) < ATOL_NATS, name


def test_best_logprobs(served: ApiServer) -> None:
    """The five best tokens at each position, by id, as the reference ranks them."""
    body = {**TO_THE_END, "return_tokens_as_token_ids": True}
    for name, prompt, answer in clear_jobs(served.references, SOME, [30], each=1, tokens=TOKENS, seed=3):
        ask: dict[str, Any] = {"model": name, "prompt": prompt, **GREEDY}
        choice = served.client.completions.create(**ask, logprobs=5, extra_body=body).choices[0]
        want = greedy_logprobs(served.references[name], prompt, answer)
        for position, best in enumerate(choice.logprobs.top_logprobs):
            for token, logprob in best.items():
                assert abs(want[position, int(token.removeprefix("token_id:"))] - logprob) < ATOL_NATS, name
            assert abs(min(best.values()) - want[position].topk(5).values[-1]) < ATOL_NATS, name


def test_prompt_logprobs(served: ApiServer) -> None:
    """Of every token of a prompt longer than a chunk, for all names at once."""
    prompt = [1, *range(30, 180)]
    with ThreadPoolExecutor(len(served.references)) as pool:
        got_at_once = pool.map(lambda name: served.server.ask_prompt(name, prompt), served.references)
        replies = dict(zip(served.references, got_at_once, strict=True))
    chosen = torch.tensor(prompt[1:])[:, None]
    plain = torch.tensor(replies["base"], dtype=torch.float64)
    for name, got in replies.items():
        want = greedy_logprobs(served.references[name], prompt[:1], prompt[1:]).gather(1, chosen)[:, 0]
        values = torch.tensor(got, dtype=torch.float64)
        assert float((want - values).abs().max()) < ATOL_NATS, name
        assert name == "base" or float((plain - values).abs().max()) > 0.1, name


def test_stop_strings(served: ApiServer) -> None:
    """The answer ends before the first of them, or after it where that is asked for."""
    for name, _, prompt, text in served.text_jobs(served.plain):
        ask: dict[str, Any] = {"model": name, "prompt": prompt, **GREEDY}
        stop = text[len(text) // 2 :][:3]
        cut = text[: text.index(stop)]
        for body, want in ((TO_THE_END, cut), ({**TO_THE_END, "include_stop_str_in_output": True}, cut + stop)):
            choice = served.client.completions.create(**ask, stop=["never this", stop], extra_body=body).choices[0]
            assert (choice.finish_reason, choice.text) == ("stop", want), name


def test_200_requests_at_once(served: ApiServer) -> None:
    """Over 16 adapters and the base, with four slots: none lost, each with its own adapter's answer."""
    names = list(served.references)
    jobs = clear_jobs(served.references, names, [5, 33, 64, 90, 150], each=12, tokens=TOKENS, seed=5)[:200]
    jobs = [job for part in range(7) for job in jobs[part::7]]  # neighbours ask for different adapters
    finished = served.server.metric("vllm:request_success_total", finished_reason="length")
    served.check_at_once(jobs, 200)
    assert served.server.metric("vllm:request_success_total", finished_reason="length") == finished + 200


def test_one_long_prompt_for_all(served: ApiServer) -> None:
    """Cut into chunks, and found in the prefix cache the second time: each adapter by what it computed itself."""
    long = torch.randint(3, 600, (40, 170), generator=torch.Generator().manual_seed(6))
    jobs = []
    for at, prompt in enumerate(long):  # a prompt for which no adapter's answer is close
        answers = [expected_answers(model, prompt[None], TOKENS) for model in served.references.values()]
        if all(float(lead) > 10 * ATOL_NATS for _, lead in answers):
            jobs = [
                (name, long[at].tolist(), a[0].tolist())
                for name, (a, _) in zip(served.references, answers, strict=True)
            ]
            break
    assert len({tuple(answer) for _, _, answer in jobs}) == ADAPTERS + 1
    before = served.server.metric("vllm:prefix_cache_hits_total")
    served.check_at_once(jobs, len(jobs))
    first = served.server.metric("vllm:prefix_cache_hits_total")
    served.check_at_once(jobs, len(jobs))
    for name, prompt, answer in jobs:
        assert served.ask(name, prompt) == answer, name
    assert first == before
    assert served.server.metric("vllm:prefix_cache_hits_total") == first + 2 * len(jobs) * 160  # five blocks of 32


def test_a_client_that_leaves(served: ApiServer) -> None:
    """In the middle of its stream: the others are answered, and nothing of its request stays behind.

    That its request ends at once is not held here: vLLM 0.32's API server, without this plugin and without LoRA too,
    sometimes lets such requests go on to their last token when decoding is fast.
    """
    jobs = clear_jobs(served.references, SOME, [20], each=3, tokens=TOKENS, seed=7)
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(served.check_at_once, jobs * 4, 8)
        for name in SOME:
            body = {"model": name, "prompt": [1, *range(50, 60)], "max_tokens": LONG, "n": 4, "stream": True}
            stream = served.client.completions.create(**body, extra_body=TO_THE_END)
            assert len(list(itertools.islice(stream, 3))) == 3
            stream.close()
        others.result()
    deadline = time.monotonic() + 600
    while served.server.metric("vllm:num_requests_running") + served.server.metric("vllm:num_requests_waiting") > 0:
        assert time.monotonic() < deadline, "the requests of clients that left are still running"
        time.sleep(0.1)
    served.check_at_once(jobs, len(jobs))


def test_another_adapter_of_the_same_name(served: ApiServer) -> None:
    """Unloaded and loaded anew while requests are running: those go on with the old adapter, beside the new one."""
    old = write_soka(served.folder / "first", random_factors(ALPHA, 2, seed=30, scale=0.02))
    new = write_soka(served.folder / "second", random_factors(ALPHA, 2, seed=31, scale=0.02))
    prompts = torch.randint(3, 600, (40, 20), generator=torch.Generator().manual_seed(8))
    (first, lead), (second, other_lead) = (expected_answers(model, prompts, TOKENS) for model in (old, new))
    good = ((torch.minimum(lead, other_lead) > 10 * ATOL_NATS) & (first != second).any(1)).nonzero().flatten()[:3]
    assert len(good) == 3
    served.load("again", served.folder / "first")
    ask: dict[str, Any] = {"model": "again", "max_tokens": LONGEST, "temperature": 0, "extra_body": TO_THE_END}
    streams = [served.client.completions.create(**ask, prompt=prompts[i].tolist(), stream=True) for i in good]
    got = [list(next(stream).choices[0].token_ids) for stream in streams]
    assert served.server.unload("again")[0] == 200
    served.load("again", served.folder / "second")
    served.check_at_once([("again", prompts[i].tolist(), second[i].tolist()) for i in good], 3)
    assert served.server.metric("vllm:num_requests_running") > 0  # the old ones
    for tokens, stream in zip(got, streams, strict=True):
        tokens.extend(token for chunk in stream for token in chunk.choices[0].token_ids)
    assert [len(tokens) for tokens in got] == [LONGEST] * 3
    assert [tokens[:TOKENS] for tokens in got] == first[good].tolist()
    assert served.server.unload("again")[0] == 200


@pytest.mark.parametrize("where", ["another folder", "its own folder"])
def test_reload_in_traffic(served: ApiServer, where: str) -> None:
    """Answers begun before the reload are the old adapter's, those begun after it the new one's, and none is both.

    Only a request that was running during the reload may change adapters half way. The prompts fill blocks of the
    prefix cache, which must not outlive the weights they were computed with.
    """
    target = served.folder / f"target {where}"
    old = write_soka(target, random_factors(ALPHA, 2, seed=20, scale=0.02))
    rebuilt = served.folder / "rebuilt" / where
    new = write_soka(rebuilt, random_factors(ALPHA, 3, seed=21, scale=0.02))
    served.load("target", target)
    prompts = torch.randint(3, 600, (12, 100), generator=torch.Generator().manual_seed(8))
    answers = [expected_answers(model, prompts, TOKENS) for model in (old, new)]
    good = [i for i in range(12) if all(float(lead[i]) > 10 * ATOL_NATS for _, lead in answers)][:4]
    expected = [[a[i].tolist() for i in good] for a, _ in answers]
    assert len(good) == 4 == sum(a != b for a, b in zip(*expected, strict=True))
    others = clear_jobs(served.references, SOME, [20, 70], each=1, tokens=TOKENS, seed=9)
    stop = Event()
    seen: list[tuple[float, float, int, list[int]]] = []

    def ask_target(at: int) -> None:
        while not stop.is_set():
            begun = time.monotonic()
            tokens = served.ask("target", prompts[good[at]].tolist())
            seen.append((begun, time.monotonic(), at, tokens))

    def ask_others() -> None:
        while not stop.is_set():
            served.check_at_once(others, 2)

    def wait_for(count: int) -> None:
        """Until `count` more answers of the target have come."""
        enough, deadline = len(seen) + count, time.monotonic() + 300
        while len(seen) < enough:
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.02)

    with ThreadPoolExecutor(5) as pool:
        running = [*(pool.submit(ask_target, at) for at in range(4)), pool.submit(ask_others)]
        try:
            wait_for(12)
            if where == "its own folder":
                shutil.copytree(rebuilt, target, dirs_exist_ok=True)
                rebuilt = target
            started = time.monotonic()
            served.load("target", rebuilt, load_inplace=True)
            done = time.monotonic()
            wait_for(16)
        finally:
            stop.set()
        assert [future.result() for future in running] == [None] * 5
    before = [(at, tokens) for _, ended, at, tokens in seen if ended < started]
    after = [(at, tokens) for begun, _, at, tokens in seen if begun > done]
    assert min(len(before), len(after)) >= 8
    assert all(tokens == expected[0][at] for at, tokens in before)
    assert all(tokens == expected[1][at] for at, tokens in after)
    assert [served.ask("target", prompts[i].tolist()) for i in good] == expected[1]
    assert served.server.unload("target")[0] == 200
