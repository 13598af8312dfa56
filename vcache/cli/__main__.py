"""`python -m vcache.cli`."""

from __future__ import annotations

import sys

from vcache.cli.command import main

sys.exit(main())
