"""`python -m tests.support.unbuilt MODULE [ARGUMENT]...`: a program of the tests with a vLLM that is not built.

Of vLLM's Python files alone, layers and what the plugin rebinds can be tried on a CPU: there are no operators of its
own, and so no server. It is told that Triton is there while it looks at its settings, since from 0.34 on it starts on
no x86 CPU without.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

os.environ["VLLM_TARGET_DEVICE"] = "cpu"


def main() -> None:
    """Run the program that the arguments name."""
    import vllm
    from vllm import triton_utils
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def with_triton(platform: Any, config: Any) -> None:
        there, triton_utils.HAS_TRITON = triton_utils.HAS_TRITON, True
        try:
            check(platform, config)
        finally:
            triton_utils.HAS_TRITON = there

    CpuPlatform.check_and_update_config = classmethod(with_triton)
    print(f"vLLM {vllm.__version__}", flush=True)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
