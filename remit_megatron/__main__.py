"""``python -m remit_megatron``: the same program as ``remit``."""

import sys

from remit_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main())
