"""A `shoal batch` over a fake engine, in a process of its own: batch_script.py ROOT STEP_S ARGUMENT..."""

import sys

sys.path.insert(0, sys.argv[1])

from shoal.launcher.cli import main
from tests.shoal import fake_engine

if __name__ == "__main__":
    fake_engine.install(step_s=float(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
