# SPDX-License-Identifier: Apache-2.0
"""Who serves a device outside of QEMU, by the options that it refers to."""

from __future__ import annotations

from typing import Final

from virtiova.collect.facts import Certainty
from virtiova.collect.qemu.create import Made
from virtiova.collect.qemu.keyvals import switch
from virtiova.collect.qemu.models import Model
from virtiova.collect.qemu.options import CommandLine, Option

_BY_TYPE: Final = {"vhost-user": "vhost-user", "vhost-vdpa": "vdpa"}
_FDS: Final = ("vhostfd", "vhostfds")


class BackEnds:
    """The back ends of a command line, by id: looked up once for each device."""

    def __init__(self, line: CommandLine) -> None:
        self._chardevs = {option.get("id"): option for option in line.all("chardev")}
        self._netdevs = {option.get("id"): option for option in line.all("netdev")}
        self._objects = {option.get("id"): option for option in line.all("object")}

    def of(self, made: Made, model: Model) -> tuple[str, Option | None, Certainty]:
        """``vhost``, ``vhost-user``, ``vdpa`` or empty; the option that says so; how sure that is."""
        if model.backend:
            return model.backend, made.option, Certainty.SAID
        option = made.option
        if model.type == "net" and option is not None:
            net = self._netdevs.get(option.get("netdev")) if "netdev" in option else None
            if net is None and option.name == "nic":
                net = option
            if net is not None:
                return self._net(net), net, Certainty.SAID
        if model.type == "crypto" and option is not None:
            served = self._objects.get(option.get("cryptodev"))
            if served is not None and served.get("qom-type") == "cryptodev-vhost-user":
                return "vhost-user", served, Certainty.SAID
        return "", None, Certainty.DEFAULT

    @staticmethod
    def _net(net: Option) -> str:
        kind = net.get("type") or net.text.partition(",")[0]
        if kind in _BY_TYPE:
            return _BY_TYPE[kind]
        if kind != "tap":
            return ""
        if "vhost" in net:
            return "vhost" if switch(net.get("vhost")) else ""
        # QEMU takes vhost for said where its descriptors are given, or it is forced.
        said = any(fd in net for fd in _FDS) or switch(net.get("vhostforce", "off"))
        return "vhost" if said else ""

    def socket(self, made: Made) -> Option | None:
        """The character device that a vhost-user device talks to."""
        option = made.option
        if option is None:
            return None
        name = option.get("chardev")
        linked = self._netdevs.get(option.get("netdev")) or self._objects.get(option.get("cryptodev"))
        if not name and linked is not None:
            name = linked.get("chardev")
        return self._chardevs.get(name) if name else None
