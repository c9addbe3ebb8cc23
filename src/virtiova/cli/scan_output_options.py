# SPDX-License-Identifier: Apache-2.0
"""The options of ``virtiova scan`` that say what becomes of it: light, like all that every start reads."""

from __future__ import annotations

import argparse
from typing import Final

from virtiova.cli.parsing import Once

FORMATS: Final = ("text", "json", "jsonl", "sarif", "html", "svg", "ascii", "prom")


def add(command: argparse.ArgumentParser) -> None:
    """Formats, files, and what is not to count."""
    command.add_argument(
        "--ignore", action="append", default=[], metavar="ID[@DEVICE]", help="a finding that does not count"
    )
    command.add_argument(
        "--ignore-file",
        action="append",
        default=[],
        metavar="FILE",
        help="the same, one a line, each with a reason after it",
    )
    command.add_argument(
        "-o",
        "--output",
        action="append",
        metavar="FILE",
        help="write a file as well; the suffix picks the format: .txt .json .jsonl .sarif .html .svg .prom .parquet",
    )
    command.add_argument("--format", action=Once, choices=FORMATS, help="on standard output (default: text)")
    command.add_argument("-j", "--json", action="store_true", help="the same as --format json")
    command.add_argument("--picture", action="store_true", help="with a picture of the ways that bytes take")
    command.add_argument(
        "--color",
        action=Once,
        choices=("auto", "always", "never"),
        default="auto",
        help="default: auto; NO_COLOR is obeyed",
    )
