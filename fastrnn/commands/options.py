"""Arguments that several subcommands have, and the devices and names behind them."""

from __future__ import annotations

import argparse

import torch

from ..cells import CELLS

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
CPU = torch.device("cpu")


def devices() -> list[torch.device]:
    """The CPU and every GPU that torch sees."""
    return [CPU, *(torch.device("cuda", k) for k in range(torch.cuda.device_count()))]


def add_selection(parser: argparse.ArgumentParser) -> None:
    """--device, --cell and --dtype."""
    parser.add_argument(
        "--device",
        nargs="+",
        type=torch.device,
        default=devices(),
        help="devices, as cpu or cuda:0 (default: all)",
    )
    parser.add_argument("--cell", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
