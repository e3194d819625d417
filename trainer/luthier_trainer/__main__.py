"""Entry point of the trainer image: `python -m luthier_trainer prepare|train|generate|publish [--run FILE]`."""

from __future__ import annotations

import sys

from luthier_trainer.supervisor.signals import Stop


def run() -> int:
    stop = Stop()  # before the imports below, which take time
    from luthier_trainer.supervisor.entrypoint import main

    code = main(sys.argv[1:], stop)
    stop.end()
    return code


if __name__ == "__main__":
    raise SystemExit(run())
