"""`python -m drift_fast` is the command `drift-fast`."""

import sys

from drift_fast.cli.main import main

sys.exit(main())
