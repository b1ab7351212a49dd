"""Sums of adapters as vLLM's requests carry them: a path that names the members, and a number of its own.

Nothing of a sum is on the disk. The engine brings its members into memory and each worker adds them up there
(`soka_vllm.summing`), so that a sum is of the adapters as they are served.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from soka_vllm.settings import SUMS_VARIABLE, sums_limit, sums_salt
from soka_vllm.sum_names import SumError, Term, parse_sum, sum_name, sum_terms

_PREFIX = "soka-sum:"
_FIRST = 1 << 30  # numbers of sums are from here to 2**31; vLLM counts those of adapters from 1


class Member(NamedTuple):
    """An adapter of a sum.

    Args:
        scale: what its delta is multiplied by.
        name, number, path, is_3d: of vLLM's request for it.
        loads: how often it was loaded in place; its number stays the same then.
    """

    scale: float
    name: str
    number: int
    path: str
    is_3d: bool
    loads: int

    def request(self) -> Any:
        """vLLM's request for the adapter."""
        from vllm.lora.request import LoRARequest

        return LoRARequest(self.name, self.number, self.path, is_3d_lora_weight=self.is_3d)


def is_sum(path: str) -> bool:
    """Whether the path of a request is a sum's."""
    return path.startswith(_PREFIX)


def members_of(lora_request: Any) -> list[Member]:
    """The adapters of a sum; none of a request for anything else.

    Raises:
        ValueError: no path that `request_of` makes.
    """
    path = lora_request.lora_path
    return members_in(path) if is_sum(path) else []


def members_in(path: str) -> list[Member]:
    """The adapters that the path of a sum names.

    Raises:
        ValueError: no path that `request_of` makes.
    """
    try:
        members = [Member(*part) for part in json.loads(path.removeprefix(_PREFIX))]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path!r:.200}: not the path of a sum") from error
    if not members or any(is_sum(member.path) for member in members):
        raise ValueError(f"{path!r:.200}: a sum is of adapters, one or more")
    return members


def request_of(terms: Sequence[Term], adapters: Mapping[str, Any], loads: Mapping[str, int]) -> Any:
    """vLLM's request for a sum; for the adapter itself where the sum is one, unscaled.

    Args:
        terms: what `sum_terms` gives.
        adapters: vLLM's requests for the adapters, by name.
        loads: how often they were loaded in place, by name, where they were.
    """
    from vllm.lora.request import LoRARequest

    if len(terms) == 1 and terms[0].scale == 1:
        return adapters[terms[0].name]
    members = []
    for scale, name in terms:
        one = adapters[name]
        member = Member(scale, name, one.lora_int_id, one.lora_path, one.is_3d_lora_weight, loads.get(name, 0))
        members.append(list(member))
    path = _PREFIX + json.dumps(members)
    digest = hashlib.sha256(f"{sums_salt()} {path}".encode()).digest()
    # Several API processes make the same number for the same sum, and the engine refuses one that is taken.
    return LoRARequest(sum_name(terms), _FIRST + int.from_bytes(digest[:8], "big") % _FIRST, path)


def sum_request(text: str, adapters: Mapping[str, Any]) -> Any:
    """vLLM's request for a sum of adapters, for `LLM.generate(..., lora_request=...)` and its like.

    Args:
        text: the sum, as "math+0.5*code".
        adapters: vLLM's LoRARequest of each adapter by the name that it has in the sum. An adapter must have the same
            integer id as where it is asked for alone.

    Raises:
        ValueError: a name that is none of `adapters`, or a scale that is no finite number; sums that are switched off.
    """
    if not sums_limit():
        raise ValueError(f"{SUMS_VARIABLE} is 0, so sums of adapters are not served")
    terms = parse_sum(text, adapters)
    missing = [term.name for term in terms if term.name not in adapters]
    if missing:
        there = ", ".join(sorted(adapters)) or "none"
        raise SumError(f"{text!r:.300}: no adapter {missing[0]!r:.80}; adapters: {there}")
    return request_of(sum_terms(terms), adapters, {})
