# SPDX-License-Identifier: Apache-2.0
"""What a real QEMU makes of a command line: started with its processors stopped, and asked over QMP."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from virtiova.collect import keys as k
from virtiova.collect.facts import Device, View
from virtiova.collect.qemu import collect
from virtiova.result.scan import Place

_SECONDS: Final = 20
_HOSTS: Final = {"pxb-host"}
_MMIO: Final = re.compile(r"dev: virtio-mmio.*?mmio ([0-9a-f]{16})/.*?bus: (virtio-mmio-bus\.\d+)", re.DOTALL)


@dataclass(frozen=True, order=True)
class Row:
    """A virtio device: its place, whether it offers bit 33, and whether it has the legacy interface."""

    place: str
    offered: bool
    legacy: bool


class Refused(Exception):
    """QEMU would not start; its words."""


class _Qmp:
    def __init__(self, sock: socket.socket) -> None:
        self._file = sock.makefile("rwb")
        self._file.readline()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: object) -> Any:
        self._file.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self._file.flush()
        while line := self._file.readline():
            answer = json.loads(line)
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise LookupError(answer["error"]["desc"])
        raise EOFError

    def get(self, path: str, prop: str) -> Any:
        return self.ask("qom-get", path=path, property=prop)


def real(words: Sequence[str], directory: Path | None = None, env: dict[str, str] | None = None) -> list[Row]:
    """The virtio devices of a real QEMU that is started with these words; `Refused` with what it says."""
    ours, theirs = socket.socketpair()
    ours.settimeout(_SECONDS)
    add = ["-S", "-display", "none", "-accel", "tcg", "-chardev", f"socket,id=asked,fd={theirs.fileno()}"]
    process = subprocess.Popen(
        [*words, *add, "-mon", "chardev=asked,mode=control"],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=directory,
        env=env,
    )
    theirs.close()
    try:
        qmp = _Qmp(ours)
        return sorted(_row(qmp, each["path"]) for each in qmp.ask("x-query-virtio"))
    except (EOFError, ConnectionError):
        process.wait(_SECONDS)
        assert process.stderr is not None
        raise Refused(process.stderr.read().decode()) from None
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
        ours.close()


def _row(qmp: _Qmp, path: str) -> Row:
    status = qmp.ask("x-query-virtio-status", path=path)
    offered = any("IOMMU_PLATFORM" in each for each in status["host-features"]["transports"])
    bus = qmp.get(path, "parent_bus")
    proxy = bus.rsplit("/", 1)[0]
    kind = qmp.get(proxy, "type")
    if kind == "virtio-mmio":
        tree = qmp.ask("human-monitor-command", **{"command-line": "info qtree"})
        at = {name: int(address, 16) for address, name in _MMIO.findall(tree)}
        # The word above bit 31 is not there to be read through the old registers.
        legacy = qmp.get(proxy, "force-legacy")
        return Row(f"mmio:0x{at[bus.rsplit('/', 1)[1]]:x}", offered and not legacy, False)
    if kind.endswith("-ccw"):
        return Row(f"ccw:{qmp.get(proxy, 'dev_id')}", offered, False)
    legacy = "non-transitional" not in kind
    with contextlib.suppress(LookupError):
        legacy = qmp.get(proxy, "disable-legacy") == "off"
    return Row(_place(qmp, proxy), offered, legacy)


def _place(qmp: _Qmp, device: str) -> str:
    uids = _uids(qmp)
    if uids:
        return f"pci:{uids[qmp.get(device, 'addr')]:04x}:00:00.0"
    chain: list[str] = []
    while True:
        devfn = qmp.get(device, "addr")
        chain.insert(0, f"{devfn >> 3:02x}.{devfn & 7}")
        bus = qmp.get(device, "parent_bus")
        device, _, name = bus.rpartition("/")
        kind = qmp.get(device, "type")
        if kind in _HOSTS:
            return f"pci:{qmp.get(f'/machine/peripheral/{name}', 'bus_nr'):02x}:{'/'.join(chain)}"
        if kind == "pnv-phb":
            domain = qmp.get(device, "index")
            return f"pci:{f'{domain:04x}:' if domain else ''}00:{'/'.join(chain)}"
        if kind == "spapr-pci-host-bridge" and (index := qmp.get(device, "index")):
            return f"pci:{index:04x}:00:{'/'.join(chain)}"
        try:
            qmp.get(device, "addr")
        except LookupError:
            return f"pci:00:{'/'.join(chain)}"


def _uids(qmp: _Qmp) -> dict[int, int]:
    """s390x: the uid of each function, by its address on QEMU's one bus."""
    found, functions = {}, {}
    for root in ("/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached"):
        for each in qmp.ask("qom-list", path=root):
            path = f"{root}/{each['name']}"
            if each["type"] == "child<zpci>":
                found[qmp.get(path, "target")] = qmp.get(path, "uid")
            elif each["type"].endswith("-pci>"):
                at = qmp.get(path, "addr")
                functions[each["name"]] = functions[f"auto_{0:02x}:{at >> 3:02x}.{at & 7}"] = at
    return {functions[target]: uid for target, uid in found.items() if target in functions}


def said(words: Sequence[str], **more: Any) -> View:
    """What the collector makes of the same words."""
    return collect(words, Place("command line", "command line"), **more)


def row(device: Device) -> Row:
    """A device of a view in the same form."""
    facts = device.facts
    offered = facts.get(k.OFFERED)
    assert offered is not None, device.name
    return Row(facts.get(k.PLACE) or "", offered, bool(facts.get(k.CAN_BE_LEGACY)))


def rows(view: View) -> list[Row]:
    """All devices of a view, in the same form."""
    return sorted(map(row, view.devices))
