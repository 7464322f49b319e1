"""`python -m hf_kd` is `hf-kd`."""

import sys

from hf_kd.cli import main

sys.exit(main())
