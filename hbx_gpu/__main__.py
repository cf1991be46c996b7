"""``python -m hbx_gpu``: the command `hbx-gpu`."""

import sys

from hbx_gpu.cli import main

if __name__ == "__main__":
    sys.exit(main())
