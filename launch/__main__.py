"""python -m thriftlab.launch: the command line, also for torchrun."""

import sys

from thriftlab.launch.cli import main

sys.exit(main())
