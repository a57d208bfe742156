"""`python -m scbin`, which is what `torchrun -m scbin` starts."""

from __future__ import annotations

import sys

from scbin.cli import main

sys.exit(main())
