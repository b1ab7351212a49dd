"""A server of a pooling model: adapters change its embeddings, and names that it does not have are refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support.serve_adapters import (
    ALPHA,
    LORA,
    PROMPTS,
    TARGET_OPTIONS,
    AdapterServer,
    summed,
    write_peft,
    write_soka,
)
from tests.support.serving import ONE_PROCESS, base_model, random_factors, serve

pytestmark = pytest.mark.slow

ATOL = 1e-5  # of an entry of a vector of norm 1, float32


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterServer]:
    folder = tmp_path_factory.mktemp("serve")
    references = {
        "base": base_model(),
        "math": write_soka(folder / "math", random_factors(ALPHA, 1, seed=1, scale=0.02)),
        "lora": write_peft(folder / "lora", LORA, seed=4),
    }
    options = ["--runner", "pooling", *TARGET_OPTIONS, "--max-loras", "2", "--max-lora-rank", "8"]
    options += ["--lora-modules", f"math={folder / 'math'}", f"lora={folder / 'lora'}"]
    with serve(folder, options, more={**ONE_PROCESS, "SOKA_SUMS": "2"}) as server:
        yield AdapterServer(server, references, folder)


def embedded(served: AdapterServer, name: str, prompt: list[int]) -> torch.Tensor:
    """The server's embedding of a prompt, (hidden,)."""
    status, reply = served.server.post("/v1/embeddings", {"model": name, "input": prompt})
    assert status == 200, reply
    return torch.tensor(reply["data"][0]["embedding"])


def expected(served: AdapterServer, name: str, prompt: list[int]) -> torch.Tensor:
    """The last token's hidden state, of norm 1, as transformers has it with the dense delta."""
    with torch.no_grad():
        states = served.references[name](torch.tensor([prompt]), output_hidden_states=True).hidden_states
    last: torch.Tensor = torch.nn.functional.normalize(states[-1][0, -1], dim=0)
    return last


def test_embeddings_with_adapters(served: AdapterServer) -> None:
    served.references["math+0.5*lora"] = summed(served.references, (1, "math"), (0.5, "lora"))
    for prompt in PROMPTS:
        plain = expected(served, "base", prompt)
        for name in ("base", "math", "lora", "math+0.5*lora"):
            got, want = embedded(served, name, prompt), expected(served, name, prompt)
            assert float((got - want).abs().max()) < ATOL, name
            assert name == "base" or float((got - plain).abs().max()) > 1000 * ATOL, name


def test_refusals(served: AdapterServer) -> None:
    ask = served.server.post
    status, reply = ask("/v1/embeddings", {"model": "mth", "input": PROMPTS[0]})
    assert status == 404, reply
    assert all(name in reply["error"]["message"] for name in ("`mth`", "math", "lora", "base")), reply
    status, reply = ask("/v1/embeddings", {"model": "math+cod", "input": PROMPTS[0]})
    assert (status, "cod" in reply["error"]["message"]) == (404, True), reply
    (served.folder / "broken").mkdir()
    (served.folder / "broken" / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    status, reply = served.server.load("broken", served.folder / "broken")
    assert (status, "LOHA" in reply["error"]["message"]) == (400, True), reply
    assert ask("/v1/embeddings", {"model": "broken", "input": PROMPTS[0]})[0] == 404
