"""Train a model: `python train.py --config configs/tiny.yaml`; `--help` lists every option and exit code."""

import sys

from transmamba_jax.training.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
