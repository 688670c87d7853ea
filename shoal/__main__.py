"""The program: `shoal ...`, `python -m shoal ...` and `torchrun ... -m shoal ...`."""

import sys

from shoal.launcher.cli import main

if __name__ == "__main__":
    sys.exit(main())
