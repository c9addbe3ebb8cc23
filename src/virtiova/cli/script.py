# SPDX-License-Identifier: Apache-2.0
"""``--script``: the Python that does the same as a command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

_HEAD = """\
from virtiova import probe
from virtiova.cli.probe import {imports}

cells = []
for cell in probe.{call}:
"""
_PRINT = """\
    print(cell.machine, cell.iommu, cell.device, cell.experiment, *cell.predicted, "->", cell.observed)
"""
_COLLECT = """\
    cells.append(cell)
"""
_JSON = """\
print(rendered("json", cells), end="")
"""
_FILE = """\
with open({path!r}, "w", encoding="utf-8") as file:
    file.write(rendered({kind!r}, cells))
"""
_ONE_AT_A_TIME = ("vfio", "vhost", "vdpa")
"""Targets that the kernel hands over to one at a time: for them ``--jobs`` changes nothing."""
_END = """\
raise SystemExit(status(cells, {fail_on!r}))
"""


def script(options: argparse.Namespace, outputs: Sequence[tuple[str, str]] = (), qemu: str = "") -> str:
    """A complete program; ``outputs``: names of files, each with its format; ``qemu``: directory of another QEMU."""
    imports = "rendered, status" if options.json or outputs else "status"
    parts = [_HEAD.format(imports=imports, call=_call(options, qemu))]
    parts += [] if options.json or options.quiet else [_PRINT]
    parts += [_COLLECT]
    parts += [_JSON] if options.json and not options.quiet else []
    parts += [_FILE.format(path=path, kind=kind) for path, kind in outputs]
    return "".join([*parts, _END.format(fail_on=options.fail_on)])


def _call(options: argparse.Namespace, qemu: str) -> str:
    extra: dict[str, object] = {}
    if options.jobs is not None and options.target not in _ONE_AT_A_TIME:
        extra["jobs"] = options.jobs
    if options.target is None:
        return f"default({_keywords(extra)})"
    if options.experiment:
        extra["experiments"] = options.experiment
    if options.ring != "split":
        extra["ring"] = options.ring
    if options.target == "qemu":
        extra |= {"iommu": options.iommu, "machine": options.machine, "interface": options.interface}
        extra |= {"qemu": qemu, "backend": options.backend or ""}
        defaults = {"machine": "q35", "interface": "auto", "qemu": "", "backend": ""}
        extra = {key: value for key, value in extra.items() if defaults.get(key) != value}
        device = options.device if len(options.device) > 1 else options.device[0]
        return f"qemu({', '.join([repr(device), _keywords(extra)])})"
    if options.target == "vhost-user":
        named = {"spawn": options.spawn, "kind": options.type, "write": options.write, "echo": options.echo}
        extra |= {key: value for key, value in named.items() if value}
        where = repr(options.socket) if options.socket else ""
        return f"vhost_user({', '.join(filter(None, [where, _keywords(extra)]))})"
    if options.target == "vhost":
        return f"vhost({', '.join(filter(None, [repr(options.path), _keywords(extra)]))})"
    if options.target == "vfio":
        named = {"write": options.write, "echo": options.echo, "i_know": options.i_know}
        extra |= {key: value for key, value in named.items() if value}
        return f"vfio({', '.join(filter(None, [repr(options.address), _keywords(extra)]))})"
    if options.target == "vdpa":
        extra |= {key: True for key in ("write", "echo") if getattr(options, key)}
        return f"vdpa({', '.join(filter(None, [repr(options.path), _keywords(extra)]))})"
    if options.iommu != "soft":
        extra["iommu"] = options.iommu
    positional = f"{options.behaviour!r}, {options.device!r}"
    return f"model({', '.join(filter(None, [positional, _keywords(extra)]))})"


def _keywords(extra: dict[str, object]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in sorted(extra.items()))
