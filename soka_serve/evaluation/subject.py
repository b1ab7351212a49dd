"""What `soka-serve eval` measures: a build and its base, on which tasks, and where they run."""

from __future__ import annotations

from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from soka_serve.errors import SokaError
from soka_serve.evaluation.results import ROLES
from soka_serve.io.file_names import CONFIG_FILE
from soka_serve.io.files import sha256_text
from soka_serve.io.own_cache import own_hashes
from soka_serve.manifest.read import LoadedManifest
from soka_serve.manifest.schema import Manifest
from soka_serve.serving.targets import Target


@dataclass(frozen=True)
class Subject:
    """The build that is measured, and its base.

    Args:
        manifest: of the build.
        target: the build's adapter or merged model.
        base: directory of the base.
        tokenizer: directory of the tokenizer.
        context: the longest context that the base takes.
    """

    manifest: Manifest
    target: Target
    base: Path
    tokenizer: Path
    context: int


class Backend(Protocol):
    """Where the models run."""

    name: str

    def identity(self) -> dict[str, Any]:
        """The properties of the backend that a score depends on."""

    def roles(self) -> AbstractContextManager[Any]:
        """Yields role -> context manager of the model to ask (`backends.RoleModel`)."""


@dataclass(frozen=True)
class Evaluation:
    """One run of `soka-serve eval`.

    Args:
        loaded: the manifest whose build is measured.
        subject: that build and its base.
        backend: where they run.
        tasks: the tasks asked for, in order.
        limit: problems per task; None is all of them.
        folder: for the results.
        allow_code_execution: consent to running code that the models write.
        parts: folder of what is done of tasks; None is one in `folder`. Evaluations that share it ask the base once.
    """

    loaded: LoadedManifest
    subject: Subject
    backend: Backend
    tasks: tuple[str, ...]
    limit: int | None
    folder: Path
    allow_code_execution: bool
    parts: Path | None = None

    @property
    def parts_folder(self) -> Path:
        """Where what is done of tasks is kept, for the next run."""
        return self.folder / ".parts" if self.parts is None else self.parts

    @property
    def result_files(self) -> tuple[Path, Path]:
        """The results as JSON, and their table."""
        return self.folder / f"results-{self.backend.name}.json", self.folder / f"results-{self.backend.name}.md"

    @property
    def generation(self) -> dict[str, int]:
        """Generation settings that the manifest gives; without any, each task has its own."""
        table = self.loaded.manifest.eval
        return {"max_gen_toks": table.max_new_tokens} if "max_new_tokens" in table.model_fields_set else {}

    @cached_property
    def weights(self) -> dict[str, str]:
        """A hash of the weights of each role; large files are hashed once and remembered, as for serving."""
        hashes = own_hashes()
        found = {}
        for role, place in zip(ROLES, (self.subject.base, self.subject.target.path), strict=True):
            files = sorted([*place.glob("*.safetensors"), *place.glob(CONFIG_FILE)])
            found[role] = sha256_text(self.subject.target.base_sha256 + "".join(hashes.file(file) for file in files))
        with suppress(SokaError, OSError):  # a cache that cannot be written costs time only
            hashes.save()
        return found
