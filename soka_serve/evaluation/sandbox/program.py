"""The program's own process: it runs what a model wrote and answers the tests' requests. Standard library only.

Loaded by path into the sandbox's bare interpreter, so it gets `wire` handed over instead of importing it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soka_serve.evaluation.sandbox import wire

MAX_ITEMS = 100_000


def run_program(code: int, requests: int, replies: int) -> None:
    """Run the program and serve requests until the tests are done.

    Args:
        code: descriptor with one frame, {"code": source}.
        requests, replies: descriptors to and from the tests' process.
    """
    job = wire.read_frame(code)
    os.close(code)
    if job is None:
        return
    objects: list[Any] = []

    def handle(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    names: dict[str, Any] = {"__name__": "__candidate__"}
    try:
        exec(compile(job["code"], "<program>", "exec", dont_inherit=True), names)
        public = {name: value for name, value in names.items() if not name.startswith("__")}
        wire.write_frame(replies, {"names": {n: wire.encode(v, handle) for n, v in public.items()}})
    except BaseException as error:  # noqa: BLE001 - whatever a program raises is its answer
        wire.write_frame(replies, {"error": wire.described(error)})
        return
    while (request := wire.read_frame(requests)) is not None:
        try:
            answer = {"value": wire.encode(_answer(request, objects), handle)}
        except BaseException as error:  # noqa: BLE001
            answer = {"error": wire.described(error)}
        wire.write_frame(replies, answer)


def _answer(request: Mapping[str, Any], objects: Sequence[Any]) -> Any:
    values = [wire.decode(value, objects.__getitem__) for value in request["values"]]
    target = objects[request["target"]]
    match request["op"]:
        case "call":
            count = request["positional"]
            named = dict(zip(request["keywords"], values[count:], strict=True))
            return target(*values[:count], **named)
        case "get":
            return getattr(target, request["name"])
        case "set":
            setattr(target, request["name"], values[0])
            return None
        case "item":
            return target[values[0]]
        case "truth":
            return bool(target)
        case "iterate":
            found = []
            for item in target:
                found.append(item)
                if len(found) > MAX_ITEMS:
                    raise OverflowError("too many items")
            return found
        case _:
            raise ValueError("unknown request")
