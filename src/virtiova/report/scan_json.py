# SPDX-License-Identifier: Apache-2.0
"""A scan as JSON, ``virtiova/scan/1``, and the schema that ``docs/scan-1.schema.json`` holds.

What there is are the dataclasses of `virtiova.result.scan`, as they are. A device has ``declared`` besides: what its
four bits say, in one object beside ``predicted`` and ``observed``.
"""

from __future__ import annotations

from collections.abc import Iterator
from inspect import cleandoc
from typing import Any, Final

import msgspec

from virtiova.report.scan_words import Part, parts
from virtiova.result.scan import SCHEMA, Scan

_ID: Final = "virtiova-scan-1"
_DECLARED: Final = ("offered", "accepted", "backend_offered", "backend_accepted")
_BEFORE: Final = "predicted"
"""The field of a device that ``declared`` stands before."""


def scan_object(scan: Scan) -> dict[str, Any]:
    """The document."""
    made: dict[str, Any] = {"schema": SCHEMA, **msgspec.to_builtins(scan)}
    made["devices"] = [_device(device) for device in made["devices"]]
    return made


def document(scan: Scan) -> str:
    """The document as text."""
    return msgspec.json.format(_encoded(scan_object(scan)), indent=2).decode() + "\n"


def lines(scan: Scan) -> Iterator[str]:
    """A line for each machine, each a document of its own: JSON Lines."""
    for part in parts(scan):
        yield _encoded(scan_object(_alone(part))).decode() + "\n"


def _alone(part: Part) -> Scan:
    return Scan(part.machine.view, [part.machine], part.devices, part.findings, part.undecided)


def _device(device: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in device.items():
        if name == _BEFORE:
            made["declared"] = {each: device[each] for each in _DECLARED}
        made[name] = value
    return made


def _encoded(made: object) -> bytes:
    try:
        return msgspec.json.encode(made)
    except UnicodeEncodeError:
        # A name that is no UTF-8 (a file's, a device's): JSON cannot say it.
        return msgspec.json.encode(_sayable(made))


def _sayable(value: Any) -> Any:
    """The same without halves of surrogate pairs."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_sayable(key): _sayable(each) for key, each in value.items()}
    return [_sayable(each) for each in value] if isinstance(value, list) else value


# -- the schema --------------------------------------------------------------------------------------------------


def schema() -> dict[str, Any]:
    """The JSON schema: every field is there in every document, and no other."""
    (reference,), components = msgspec.json.schema_components([Scan], ref_template="#/$defs/{name}")
    for each in components.values():
        if "description" in each:
            each["description"] = cleandoc(each["description"])
        if "properties" in each:
            _close(each)
    device = components["ScannedDevice"]
    fields = {name: device["properties"][name] for name in _DECLARED}
    said = "What device and driver say, and what the machine and a back end say: the same four, together."
    declared: dict[str, Any] = {"type": "object", "description": said, "properties": fields}
    _close(declared)
    components["Declared"] = declared
    device["properties"] |= {"declared": {"$ref": "#/$defs/Declared"}}
    device["required"].append("declared")
    whole = components["Scan"]
    whole["properties"] = {"schema": {"enum": [SCHEMA]}} | whole["properties"]
    whole["required"].insert(0, "schema")
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": _ID, "title": SCHEMA}
    return head | reference | {"$defs": components}


def _close(found: dict[str, Any]) -> None:
    for each in found["properties"].values():
        each.pop("default", None)
    found["required"] = list(found["properties"])
    found["additionalProperties"] = False
