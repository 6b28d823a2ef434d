"""Entry point of the ``alkahest`` command, and of ``python -m alkahest``."""

from __future__ import annotations

import os
import signal
import sys

from alkahest.errors import INTERRUPTED

_INTERRUPTED = 130  # a shell's code of a program that Ctrl-C ended


def main() -> None:
    """Run the command line; Ctrl-C is one line and exit code 130, from the first moment on."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not of a job in the background
        signal.signal(signal.SIGINT, _leave)
    from alkahest.cli import app

    try:
        app()
    except SystemExit as left:
        if left.code == _INTERRUPTED:
            # Where the interrupt met code that is run from text, as imports do, Python remembers it as unhandled and
            # ends by the signal, whatever was made of it since.
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(_INTERRUPTED)
        raise


def _leave(number: int, frame: object) -> None:
    """Leave at once: while packages are imported nothing is at work yet, and an exception may be swallowed there."""
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{INTERRUPTED}\n".encode())
    os._exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
