"""Write the report of a run."""

import argparse
import sys
from collections.abc import Sequence

from transmamba_jax.report.summary import write_report
from transmamba_jax.runtime.paths import option_path


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report of a run, one page among it, from its config.yaml and metrics.jsonl, and print where it is."""
    parser = argparse.ArgumentParser(prog="transmamba report", description=main.__doc__)
    parser.add_argument("workdir", type=option_path, metavar="WORKDIR", help="work directory of the run")
    try:
        print(write_report(parser.parse_args(arguments).workdir))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
