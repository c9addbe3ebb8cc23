# SPDX-License-Identifier: Apache-2.0
"""Back ends and the machines that they serve, brought together by the path of their socket."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence

from virtiova.collect import keys as k
from virtiova.collect.facts import View, ViewKind


def fold(views: Sequence[View]) -> list[View]:
    """The same without the back ends: what is known of each is a fact of the devices that it serves.

    A path that is relative on one side is the same as any that ends in it. A back end that serves no device of any
    machine stays, and says so.
    """
    machines = [view for view in views if view.kind is not ViewKind.BACKEND]
    kept: list[View] = []
    for view in views:
        if view.kind is not ViewKind.BACKEND:
            kept.append(view)
            continue
        if not _give(view, machines) and not view.empty:
            sockets = ", ".join(sorted(path for each in view.devices if (path := each.facts.get(k.BACKEND_SOCKET))))
            view.problems.append(f"{view.name}: no device of the machines here is served at {sockets or 'a socket'}")
            view.devices, view.empty = [], True
            kept.append(view)
        elif view.empty:
            kept.append(view)
        else:
            for machine in machines:
                machine.problems += view.problems
    return kept


def _give(backend: View, machines: Sequence[View]) -> bool:
    served = False
    for end in backend.devices:
        path = end.facts.get(k.BACKEND_SOCKET) or ""
        for machine in machines:
            for device in machine.devices:
                if _same(path, device.facts.get(k.BACKEND_SOCKET) or ""):
                    missing = (k.TYPE,) if k.TYPE not in device.facts else ()
                    for key in (k.BACKEND_PRODUCT, k.BACKEND_OPTIONS, k.BACKEND_OFFERED, *missing):
                        for fact in end.facts.all(key):
                            device.facts.put(key, fact.value, fact.place, fact.certainty)
                    served = True
                    if backend.name not in machine.source.split("\n"):
                        machine.source += f"\n{backend.name}"
    return served


def _same(one: str, other: str) -> bool:
    if not one or not other:
        return False
    one, other = posixpath.normpath(one), posixpath.normpath(other)
    if one == other:
        return True
    relative, absolute = (one, other) if not one.startswith("/") else (other, one)
    return absolute.startswith("/") and absolute.endswith(f"/{relative}")
