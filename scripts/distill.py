"""What `accelerate launch` starts: `hf-kd distill` with the same options."""

import sys

from hf_kd.cli import main

sys.exit(main(["distill", *sys.argv[1:]]))
