"""The command line as ``python -m lineas``."""

import sys

from lineas.cli import main

sys.exit(main())
