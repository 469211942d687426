"""``bayling-delta``, and ``python -m bayling_delta``."""

import signal
from typing import NoReturn


def run() -> NoReturn:
    """Run the command line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while it is loaded, nothing is begun that could be told of
    from bayling_delta.cli import main

    main()


if __name__ == "__main__":
    run()
