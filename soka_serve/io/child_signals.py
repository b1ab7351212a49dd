"""Reset the signals of a new process to the system's defaults. Uses the standard library only."""

from __future__ import annotations

import signal

_PYTHONS = {signal.SIGPIPE, signal.SIGXFSZ}  # errors to Python, which ignores them; subprocess resets them itself
_TERMINALS = {signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}


def default_signals(*, shares_terminal: bool = False) -> None:
    """Undo what this process inherited: each signal that is ignored gets the system's default, and none is blocked.

    Run in a child, before it becomes another program (`preexec_fn`) or at its start. What is ignored or blocked stays
    so over fork and exec: a shell without job control starts `command &` with SIGINT and SIGQUIT ignored, nohup does
    with SIGHUP, and other parents have their own. A child that ignores the signal it is to be ended by, or that its
    limits are kept by, would run on.

    Args:
        shares_terminal: it is in its parent's process group, which the terminal's signals reach as a whole: whoever
            started the parent has chosen for both, and these stay as they are.
    """
    kept = _PYTHONS | (_TERMINALS if shares_terminal else set())
    for number in signal.valid_signals() - kept:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
