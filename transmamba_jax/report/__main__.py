"""Write the report of a run, or a page that compares several."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transmamba_jax.report.compare import write_comparison
from transmamba_jax.report.summary import write_report
from transmamba_jax.runtime import hardware, logs
from transmamba_jax.runtime.paths import option_path, show_path


@logs.command
def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report of one run into WORKDIR/report/, or of several side by side into DIR; print the page's path."""
    parser = argparse.ArgumentParser(prog="transmamba report", description=main.__doc__)
    parser.add_argument("workdirs", nargs="+", type=option_path, metavar="WORKDIR", help="work directory of a run")
    parser.add_argument(
        "--output",
        type=option_path,
        default=Path("comparison"),
        metavar="DIR",
        help="folder for the page of several runs (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        hardware.require_devices()
        several = len(options.workdirs) > 1
        page = write_comparison(options.workdirs, options.output) if several else write_report(*options.workdirs)
        print(show_path(page))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
