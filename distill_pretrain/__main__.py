"""`python -m distill_pretrain`, which is how torchrun starts the command line."""

import sys

from distill_pretrain.cli.main import main

# Spawned workers and megatron-core import this module again.
if __name__ == "__main__":
    sys.exit(main())
