"""`python -m nvlm_train`: what torchrun and srun start."""

import sys

from nvlm_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
