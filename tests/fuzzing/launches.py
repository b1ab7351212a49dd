"""Options for vLLM at random: a command that keeps what was checked, or a SokaError. And logs of failed servers."""

from __future__ import annotations

from hypothesis import strategies as st

from soka_serve.builtin import base_directory
from soka_serve.errors import SokaError
from soka_serve.serving.base import ServedBase
from soka_serve.serving.command import ServeOptions, make_launch
from soka_serve.serving.log import failure_lines, last_stage, root_causes
from soka_serve.serving.targets import Target
from tests.fuzzing.limits import bounded

# Served options, those that would make untrue what was checked, and those that vLLM's other entry point leaves out.
_TAKEN = ("--model", "--lora-modules", "--config", "--trust-remote-code", "--uds", "--headless", "--grpc")
_PROCESSES = ("--api-server-count", "--api_server_count", "--api-server", "-asc", "-as")
_NAMES = st.sampled_from(
    [*_TAKEN, *_PROCESSES, "--port", "--host", "--max-loras", "--served-model-name", "-tp", "--enforce-eager", "-O1"]
) | st.text(alphabet="-abcs_=.1 \x00é", min_size=1, max_size=12)
_VALUES = st.sampled_from(["0", "1", "2", "-1", "2.0", "", "tiny", "é", "9" * 5000]) | st.text(max_size=6)
_OPTIONS = st.lists(st.one_of(_NAMES, _VALUES, st.builds("{}={}".format, _NAMES, _VALUES)), max_size=8)
_WORDS = ("Traceback (most recent call last):", "ValueError: x", "  File 'x'", "RuntimeError: See root cause above", "")
_LINES = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "(APIServer pid=1) ", "(EngineCore pid=2) ", "(Worker pid=3) ERROR 11-29 16:53:34 [c.py:1] "]),
    st.sampled_from(["", "ERROR 11-29 16:53:34 [c.py:1] ", "[", "("]),
    st.sampled_from(_WORDS) | st.text(max_size=30),
)


def check_launch(draw: st.DrawFn) -> bool:
    """Whether the options were accepted."""
    base = base_directory()
    target = Target("a", "a", "adapter", base, peft_type="SOKA")
    later = draw(st.booleans())
    settings = ServeOptions(runtime_loading=later, vllm=tuple(draw(_OPTIONS)))
    with bounded():
        try:
            launch = make_launch([target], ServedBase(base, "tiny", None), settings)
        except SokaError:
            return False
    assert launch.command[1:4] == ("-m", "soka_serve.serving.vllm_command", str(base))
    given = [word.partition("=")[0].replace("_", "-") for word in settings.vllm if word.startswith("-")]
    assert not set(given) & set(_TAKEN)
    assert not later or not any(
        word in _PROCESSES and settings.vllm[i + 1 : i + 2] == ("2",) and word not in settings.vllm[i + 1 :]
        for i, word in enumerate(settings.vllm)
    )
    return True


def check_log(draw: st.DrawFn) -> bool:
    """Whether the log says a cause."""
    log = "\n".join(draw(st.lists(_LINES, max_size=30)))
    with bounded():
        shown, causes = failure_lines(log), root_causes(log)
        assert len(shown) <= 8
        assert len(causes) <= 2
        assert "\n" not in last_stage(log)
        assert bool(shown) == bool(log.strip()) or not causes
    return bool(causes)
