"""The Ray Serve application of replicas with a stand-in for vLLM: `tests.support.stand_in_app:app`."""

from __future__ import annotations

import sys
from typing import Any

from ray.serve import Application

from soka_serve.serving.command import Launch
from soka_serve.serving.replica import Replica, ReplicaSettings, free_port
from soka_serve.serving.replicas import ReplicaOptions, application
from soka_serve.serving.targets import Target

MODULE = "tests.support.stand_in_vllm"


class StandIn(Replica):
    """A replica whose server is the stand-in."""

    @staticmethod
    def _plan(settings: ReplicaSettings) -> tuple[list[Target], Launch]:
        port = free_port()
        return [], Launch(command=(sys.executable, "-m", MODULE, str(port)), port=port)


def app(arguments: dict[str, Any]) -> Application:
    """The application; `targets` are of no account."""
    return application(ReplicaOptions.model_validate(arguments), StandIn)
