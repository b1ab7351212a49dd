"""A Ray Serve application: replicas of a vLLM server with the plugin, behind one OpenAI-compatible address.

    serve run soka_serve.serving.replicas:app targets='build/math build/code' replicas=2

Each replica starts vLLM as `soka-serve serve` does, and passes requests on to it as they are. A request goes to a
replica that holds its adapter in a slot, by Ray Serve's model multiplexing.
"""

from __future__ import annotations

import shlex
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from ray import serve
from ray.serve import Application

from soka_serve.serving.command import parse_options
from soka_serve.serving.replica import Replica, ReplicaSettings
from soka_serve.serving.replica_front import Front


def _words(value: Any) -> Any:
    """`serve run` gives every value as a text."""
    return shlex.split(value) if isinstance(value, str) else value


_Words = Annotated[list[str], BeforeValidator(_words)]


class ReplicaOptions(BaseModel):
    """The arguments of the application, as `serve run` or the `args` of a Serve config give them."""

    model_config = ConfigDict(extra="forbid")

    targets: _Words = Field([], description="[NAME=]TARGET each, as for `soka-serve serve`.")
    base: str | None = Field(None, description="Replaces the base that the adapters name.")
    builds: str | None = Field(
        None, description="A folder of builds, or its URL: its adapters are loaded at their first request."
    )
    vllm: _Words = Field([], description="Options of `vllm serve`, such as --max-loras 8.")
    replicas: int = Field(1, ge=1, description="Replicas; with max_replicas the fewest.")
    max_replicas: int | None = Field(None, ge=1, description="The most replicas: they are then scaled by load.")
    target_requests: float = Field(16, gt=0, description="Running requests a replica that scaling aims at.")
    add_after_s: float = Field(30, ge=0, description="Seconds of more load than aimed at, after which one is added.")
    remove_after_s: float = Field(600, ge=0, description="Seconds of less load, after which one is taken away.")
    max_requests: int = Field(256, ge=1, description="Requests at once in a replica; more wait in the front.")
    fronts: int = Field(1, ge=1, description="Processes that take requests and choose replicas.")
    cpus: float = Field(1, ge=0, description="CPUs of a replica, as Ray counts them.")
    gpus: float = Field(0, ge=0, description="GPUs of a replica; as many as --tensor-parallel-size.")
    by_adapter: bool = Field(True, description="False: replicas are chosen by load alone.")
    start_s: float = Field(1800, gt=0, description="Seconds that a replica's vLLM may take to start.")
    retry_s: float = Field(600, ge=0, description="Seconds for which a request that lost its replica is sent again.")

    @model_validator(mode="after")
    def _check(self) -> ReplicaOptions:
        if not self.targets and self.builds is None:
            raise ValueError("nothing to serve: give targets, or a folder of builds")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas = {self.max_replicas} is less than replicas = {self.replicas}")
        scaling = [
            name for name in ("target_requests", "add_after_s", "remove_after_s") if name in self.model_fields_set
        ]
        if scaling and self.max_replicas is None:
            raise ValueError(f"{scaling[0]} is for scaling by load: give max_replicas as well, or leave it out")
        taken = [name for name in ("--host", "--port") if name in parse_options(self.vllm)]
        if taken:
            raise ValueError(f"vllm: {taken[0]} is a replica's own; the application's is in Serve's http_options")
        return self


def app(arguments: dict[str, Any]) -> Application:
    """The application for Ray Serve (`soka_serve.serving.replicas:app`).

    Args:
        arguments: those of `ReplicaOptions`, by name.

    Raises:
        ValidationError: arguments that are unknown, or that do not fit together.
        SokaError: something before the first option in `vllm`.
    """
    return application(ReplicaOptions.model_validate(arguments))


def application(options: ReplicaOptions, kind: type[Replica] = Replica) -> Application:
    """The application of these options, with replicas of this kind.

    Raises:
        SokaError: as `app`.
    """
    scale: dict[str, Any] = {"num_replicas": options.replicas}
    if options.max_replicas is not None:
        scale = {
            "autoscaling_config": {
                "min_replicas": options.replicas,
                "max_replicas": options.max_replicas,
                "target_ongoing_requests": options.target_requests,
                "upscale_delay_s": options.add_after_s,
                "downscale_delay_s": options.remove_after_s,
            }
        }
    settings = ReplicaSettings(
        targets=tuple(options.targets),
        base=options.base,
        builds=options.builds,
        vllm=tuple(options.vllm),
        start_s=options.start_s,
    )
    replica = serve.deployment(
        name="Replica",
        max_ongoing_requests=options.max_requests,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        # A replica that is taken away finishes what it has; vLLM is asked how it does, and a busy one answers late.
        graceful_shutdown_timeout_s=600,
        health_check_period_s=5,
        health_check_timeout_s=120,
        max_constructor_retry_count=3,
        **scale,
    )(_with_slots(kind, settings.slots()))
    front = serve.deployment(
        name="Front",
        num_replicas=options.fronts,
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=600,
    )(Front)
    return front.bind(replica.bind(settings), by_adapter=options.by_adapter, retry_s=options.retry_s)


def _with_slots(kind: type[Replica], slots: int) -> type[Replica]:
    """A replica's class that tells Ray Serve of as many adapters as vLLM has slots: the ones used last."""

    async def hold(self: Replica, adapter: str) -> str:
        return adapter

    return type(kind.__name__, (kind,), {"hold": serve.multiplexed(max_num_models_per_replica=slots)(hold)})
