"""`python -m spo`."""

import sys

from spo.cli import main

sys.exit(main())
