"""`python -m drift_fast` is the command `drift-fast`."""

import sys

from drift_fast.cli import main

sys.exit(main())
