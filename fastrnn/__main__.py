"""``python -m fastrnn info | check | tune | bench``: what this machine has, whether its kernels are
right, and how fast they are."""

from __future__ import annotations

import argparse
import sys

from .commands import bench, check, info, tune

COMMANDS = {"info": info, "check": check, "tune": tune, "bench": bench}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastrnn", description=__doc__)
    commands = parser.add_subparsers(metavar="command", required=True)
    for name, command in COMMANDS.items():
        text = command.__doc__ or ""
        own = commands.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(own)
        own.set_defaults(run=command.run)
    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
