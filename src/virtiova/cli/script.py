# SPDX-License-Identifier: Apache-2.0
"""``--script``: the Python that does the same as a command line."""

from __future__ import annotations

import argparse

_BODY = """\
from virtiova import probe
from virtiova.cli.probe import status

cells = []
for cell in {call}:
    print(cell.machine, cell.iommu, cell.device, cell.experiment, *cell.predicted, "->", cell.observed)
    cells.append(cell)
raise SystemExit(status(cells, {fail_on!r}))
"""


def script(options: argparse.Namespace) -> str:
    """A complete program."""
    return _BODY.format(call=f"probe.{_call(options)}", fail_on=options.fail_on)


def _call(options: argparse.Namespace) -> str:
    extra = {}
    if options.jobs is not None:
        extra["jobs"] = options.jobs
    if options.target is None:
        return f"default({_keywords(extra)})"
    if options.experiment:
        extra["experiments"] = options.experiment
    if options.target == "qemu":
        extra |= {"iommu": options.iommu, "machine": options.machine, "interface": options.interface}
        defaults = {"machine": "q35", "interface": "auto"}
        extra = {key: value for key, value in extra.items() if defaults.get(key) != value}
        return f"qemu({', '.join([repr(options.device), _keywords(extra)])})"
    if options.iommu != "soft":
        extra["iommu"] = options.iommu
    positional = f"{options.behaviour!r}, {options.device!r}"
    return f"model({', '.join(filter(None, [positional, _keywords(extra)]))})"


def _keywords(extra: dict[str, object]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in sorted(extra.items()))
