"""`python -m spo`."""

import sys

from spo.cli.main import main

sys.exit(main())
