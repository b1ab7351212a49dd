"""The runs of a suite as tasks of a Ray cluster, each a process of its own with one CPU (and one GPU, where there are).

Nothing but the record comes back from the machine of a run, so no folder has to be shared. What a suite reads (data,
base, what methods start from) has to be under the same path everywhere, on a shared disk or as copies: each machine
reads it, and one that finds anything else is refused.
"""

from __future__ import annotations

import json
import logging
import platform
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soka_serve.comparison.plan import RunInputs, RunSpec
from soka_serve.comparison.read import LoadedSuite
from soka_serve.errors import BuildError, SokaError, install_extra, name_some
from soka_serve.io.files import write_text_atomic
from soka_serve.io.own_cache import own_hashes

logger = logging.getLogger(__name__)

_TRIES = 3  # of a run whose process or machine dies
_CONNECT_S = 5.0
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class _Refusal:
    """Why a machine cannot do a suite's runs."""

    machine: str
    reason: str


@dataclass
class _Task:
    """A run under way: where its record goes, and how many times it was begun."""

    run: RunSpec
    file: Path
    tries: int = 1


class Cluster:
    """A Ray cluster that this process is connected to.

    Args:
        ray: the module.
        address: what the user called it.
    """

    def __init__(self, ray: Any, address: str) -> None:
        self.ray = ray
        self.address = address

    def count(self, resource: str) -> int:
        """How many whole units of "CPU" or "GPU" its machines have together, now."""
        return int(self.ray.cluster_resources().get(resource, 0))

    def machines(self, resource: str) -> list[Mapping[str, Any]]:
        """Its machines that have at least one unit of a resource."""
        return [node for node in self.ray.nodes() if node["Alive"] and node["Resources"].get(resource, 0) >= 1]


@contextmanager
def connected(address: str | None) -> Iterator[Cluster | None]:
    """Connect to a cluster, and disconnect at the end of the block; None where no address is given.

    A connection that the caller has made already is used, and left open.

    Raises:
        BuildError: Ray is not installed, or no cluster answers at the address.
    """
    if address is None:
        yield None
        return
    try:
        import ray
    except ImportError:
        raise BuildError(
            f"--ray {address}: Ray is not installed", hint=f"{install_extra('ray')}, on every machine"
        ) from None
    if ray.is_initialized():
        yield Cluster(ray, address)
        return
    _check_address(address)
    try:
        ray.init(
            address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": _ENVIRONMENT},
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BuildError(f"--ray {address}: {_first(error)}", hint=_hint(address)) from error
    try:
        yield Cluster(ray, address)
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Refuse what is no address, and one where nobody listens: Ray waits for minutes there, and ends the process."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise BuildError(
            f"--ray {address}: expected HOST:PORT of the cluster's head, or auto",
            hint="Run it on a machine of the cluster, or as a job: ray job submit -- soka-serve compare ... --ray auto",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise BuildError(f"--ray {address}: no answer: {error}", hint=_hint(address)) from None


def _hint(address: str) -> str:
    if address == "auto":
        return "Start one (ray start --head), set RAY_ADDRESS, or give HOST:PORT of its head."
    return "Is it the address that `ray start --head` printed, with the same Ray and Python here as there?"


class RayPool:
    """Tasks of a cluster, one per run; does what `pool.Pool` does on one machine.

    A run whose process or machine dies is begun again, elsewhere if need be, up to three times.

    Args:
        cluster: where.
        jobs: runs at a time; None: as many as the cluster has CPUs (GPUs where this machine has one).
        loaded: the suite.
        inputs: what its runs depend on, as this machine reads it.

    Raises:
        BuildError: the cluster has no room, or a machine of it that cannot do the runs.
    """

    def __init__(self, cluster: Cluster, jobs: int | None, loaded: LoadedSuite, inputs: RunInputs) -> None:
        self._cluster, self._ray, self._jobs = cluster, cluster.ray, jobs
        self._resource = "GPU" if inputs.device == "cuda" else "CPU"
        self._tasks: dict[Any, _Task] = {}
        given = {"num_cpus": 1, "num_gpus": 1 if self._resource == "GPU" else 0}
        # A process for each run, as on one machine; who dies is begun again here, where it is counted and told.
        self._work = self._ray.remote(max_calls=1, max_retries=0, **given)(_run)
        self._check_machines(loaded, inputs)
        self._suite, self._inputs = self._ray.put(loaded), inputs

    @property
    def has_room(self) -> bool:
        room = self._jobs or self._cluster.count(self._resource)
        return len(self._tasks) < max(room, 1)  # a cluster that has none now may grow

    @property
    def busy(self) -> bool:
        return bool(self._tasks)

    def start(self, run: RunSpec, loaded: LoadedSuite, scratch: Path, file: Path) -> None:
        """Begin a run; its record will be `file`."""
        self._begin(_Task(run, file))

    def wait(self) -> list[RunSpec]:
        """The runs that have ended, at least one.

        Raises:
            BuildError: a machine that has joined cannot do the runs.
        """
        while True:
            ready, _ = self._ray.wait(list(self._tasks), num_returns=1)
            ended = [task.run for reference in ready if (task := self._end(reference)) is not None]
            if ended:
                return ended

    def stop(self) -> None:
        """End what runs."""
        for reference in self._tasks:
            self._ray.cancel(reference, force=True)

    def _begin(self, task: _Task) -> None:
        self._tasks[self._work.remote(self._suite, task.run, self._inputs)] = task

    def _end(self, reference: Any) -> _Task | None:
        """Write the record of a task that has ended; None if it is begun again."""
        task = self._tasks.pop(reference)
        died = self._ray.exceptions
        try:
            found = self._ray.get(reference)
        except (died.LocalRayletDiedError, died.RaySystemError) as error:
            raise BuildError(
                f"--ray {self._cluster.address}: the connection to the cluster was lost: {_first(error)}",
                hint="Finished runs are kept; the same command goes on when the cluster is back.",
            ) from error
        except (died.WorkerCrashedError, died.NodeDiedError, died.OutOfMemoryError, died.ObjectLostError) as error:
            why = _first(error)
            if task.tries < _TRIES:
                logger.warning("%s: its process died, and it is begun again: %s", task.run.to_text(), why)
                self._begin(_Task(task.run, task.file, task.tries + 1))
                return None
            found = _failed(task.run, f"the process died {_TRIES} times: {why}")
        except died.RayError as error:
            found = _failed(task.run, f"Ray could not run it: {str(error).strip().splitlines()[-1]}")
        if isinstance(found, _Refusal):
            raise _refused([found])
        write_text_atomic(task.file, found)
        return task

    def _check_machines(self, loaded: LoadedSuite, inputs: RunInputs) -> None:
        """Have every machine look at what the suite reads."""
        machines = self._cluster.machines(self._resource)
        if not machines:
            raise BuildError(
                f"--ray {self._cluster.address}: no machine of it has a {self._resource}",
                hint="Add one: ray start --address HOST:PORT",
            )
        logger.info(
            "ray: %d %ss on %d machines; each looks at the suite's files",
            self._cluster.count(self._resource),
            self._resource,
            len(machines),
        )
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        check = self._ray.remote(num_cpus=0, max_calls=1)(check_machine)
        asked = {
            node["NodeManagerHostname"] or node["NodeManagerAddress"]: check.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(loaded, inputs)
            for node in machines
        }
        if refusals := [found for machine, reference in asked.items() if (found := self._answer(machine, reference))]:
            raise _refused(refusals)

    def _answer(self, machine: str, reference: Any) -> _Refusal | None:
        died = self._ray.exceptions
        try:
            found: _Refusal | None = self._ray.get(reference)
        except (died.NodeDiedError, died.TaskUnschedulableError):
            logger.warning("%s left the cluster", machine)
            return None
        except died.RayError as error:  # its soka-serve is missing, or another
            return _Refusal(machine, str(error).strip().splitlines()[-1])
        return found


def _first(error: Exception) -> str:
    """The first sentence of one of Ray's errors, which go on with places of logs."""
    return str(error).strip().split("\n")[0].split(". ")[0]


def _refused(refusals: list[_Refusal]) -> BuildError:
    lines = [f"machine {refusal.machine} cannot do these runs: {refusal.reason}" for refusal in refusals]
    return BuildError(
        "\n".join(lines[:10] + [f"and {len(lines) - 10} more"] * (len(lines) > 10)),
        hint="Every machine needs the same packages, and the suite's files under the same path: on a disk that all "
        "share, or as copies.",
    )


def _failed(run: RunSpec, message: str) -> str:
    return json.dumps(run.describe() | run.failure(message)) + "\n"


def check_machine(loaded: LoadedSuite, inputs: RunInputs) -> _Refusal | None:
    """Whether this machine reads what the machine of the command has read; None where it does."""
    from soka_serve.comparison.inputs import read_inputs

    logging.getLogger("soka_serve").setLevel(logging.ERROR)
    try:
        here = read_inputs(loaded, own_hashes())
    except (SokaError, OSError) as error:
        return _Refusal(platform.node(), str(error))
    differing = list(_differences(here, inputs))
    return _Refusal(platform.node(), "; ".join(differing)) if differing else None


def _differences(here: RunInputs, there: RunInputs) -> Iterator[str]:
    """What of the inputs is not the same, in words."""
    ours = {**here.versions, **here.packages}
    changed = [
        f"{package} {ours.get(package, 'missing')} instead of {version}"
        for package, version in {**there.versions, **there.packages}.items()
        if ours.get(package) != version
    ]
    if changed:
        yield f"it has {name_some(changed)}"
    if here.device != there.device:
        yield f"its device is {here.device}, and that of this machine {there.device}"
    for what, one, other in (
        ("the base's weights", here.base, there.base),
        ("the base's config or tokenizer", here.papers, there.papers),
        ("data of [[dataset]]", here.data, there.data),
        ("data of [[other]]", here.other, there.other),
        ("checkpoints or adapters that methods start from", here.sources, there.sources),
    ):
        if one != other:
            yield f"{what}: other content under the same path"


def _run(loaded: LoadedSuite, run: RunSpec, inputs: RunInputs) -> str | _Refusal:
    """Do one run on this machine; its record as JSON."""
    refusal = check_machine(loaded, inputs)  # the machine may have joined since the others were asked
    if refusal is not None:
        return refusal
    from soka_serve.comparison.worker import run_and_record

    with tempfile.TemporaryDirectory(prefix="soka-run-") as folder:
        file = Path(folder) / "record.json"
        run_and_record(loaded, run, Path(folder), file)
        return file.read_text()
