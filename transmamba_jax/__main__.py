"""Run a command of the package: `transmamba NAME ...`, or `python -m transmamba_jax NAME ...`.

A command is a folder with a `__main__.py`, which `python -m transmamba_jax.NAME` runs as well. Only the one that is
asked for is imported.
"""

import argparse
import ast
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from transmamba_jax import __version__

_PACKAGE = Path(__file__).parent


def commands() -> dict[str, str]:
    """Return name -> module, relative to the package, of every command."""
    rooms = sorted(path.parent.name for path in _PACKAGE.glob("*/__main__.py"))
    others = {room: room for room in rooms if room != "training"}
    of_data = {name: f"data.{name.replace('-', '_')}" for name in ("train-tokenizer", "write-records")}
    return {"train": "training", **others, **of_data}


def summary(module: str) -> str:
    """Return the first line of a command's docstring, without importing it."""
    path = _PACKAGE / module.replace(".", "/")
    source = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].partition(":")[0].rstrip(".")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names, with the others."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    modules = commands()
    listing = "\n".join(f"  {name:<16} {summary(module)}" for name, module in modules.items())
    parser = argparse.ArgumentParser(
        prog="transmamba",
        usage="transmamba NAME [options]",
        description=f"commands, each with --help:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("name", choices=tuple(modules), metavar="NAME", help="one of the commands above")
    module = modules[parser.parse_args(arguments[:1]).name]
    sys.argv[1:] = arguments[1:]
    runpy.run_module(f"{__package__}.{module}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
