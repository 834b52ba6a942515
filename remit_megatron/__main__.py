"""The program: ``remit``, and ``python -m remit_megatron``."""

import sys

from remit_megatron.runtime import first_signals


def main() -> int:
    """Runs the command of this process's command line; returns its exit code."""
    first_signals.take(sys.argv[1:])
    from remit_megatron.cli import main as run  # after it: importing takes longer than everything before

    return run()


if __name__ == "__main__":
    sys.exit(main())
