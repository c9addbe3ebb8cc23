# SPDX-License-Identifier: Apache-2.0
"""The results as JSON, ``virtiova/bench/1``, and the schema that ``docs/bench-1.schema.json`` holds."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from virtiova.bench.rows import SCHEMA, Document, Row, Setting


class SettingObject(msgspec.Struct, forbid_unknown_fields=True):
    """With what a figure was measured. Null, or an empty text, where that has no meaning for it."""

    bit: bool | None
    mappings: int | None
    pages: int | None
    depth: int | None
    front: Literal["poll", "sleep", ""]
    ring: Literal["split", "packed", ""]


class TargetObject(msgspec.Struct, forbid_unknown_fields=True):
    """What a ratio is to be, at least or at most."""

    value: float
    at_most: bool
    met: bool | None


class ResultObject(msgspec.Struct, forbid_unknown_fields=True):
    """A figure of one subject with one setting. Without samples min, median and max are null, and note says why."""

    bench: Literal["blk", "net", "iotlb", "guest", "vfio"]
    subject: str
    setting: SettingObject
    figure: str
    unit: str
    rounds: int
    min: float | None
    median: float | None
    max: float | None
    note: str
    beside: str | None
    beside_setting: SettingObject | None
    target: TargetObject | None


class DocumentObject(msgspec.Struct, forbid_unknown_fields=True):
    """A run. Against are the reasons not to trust it: it is trusted if there are none."""

    schema: Literal["virtiova/bench/1"]
    trusted: bool
    against: list[str]
    about: list[str]
    results: list[ResultObject]


_ID: Final = "virtiova-bench-1"


def encode(document: Document) -> str:
    """The document as text."""
    made = DocumentObject(
        schema=SCHEMA,
        trusted=not document.against,
        against=list(document.against),
        about=list(document.about),
        results=[_result(row) for row in document.rows],
    )
    return msgspec.json.format(msgspec.json.encode(made), indent=2).decode()


def decode(text: str | bytes) -> DocumentObject:
    """From text; `msgspec.ValidationError` for anything that the schema does not allow."""
    return msgspec.json.decode(text, type=DocumentObject)


def rows(document: DocumentObject) -> list[Row]:
    """The figures of blk and net, with the least, the median and the most as their samples."""
    found = []
    for result in document.results:
        if result.bench not in ("blk", "net"):
            continue
        low, mid, high, at = result.min, result.median, result.max, result.setting
        samples = () if low is None or mid is None or high is None else (low, mid, high)
        setting = Setting(at.mappings or 0, at.pages or 0, at.depth or 0, at.front, at.ring or "split")
        found.append(Row(result.bench, result.subject, setting, result.figure, result.unit, samples, result.note))
    return found


def schema() -> dict[str, Any]:
    """The JSON schema."""
    found = msgspec.json.schema(DocumentObject)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": _ID, "title": SCHEMA} | found


def _result(row: Row) -> ResultObject:
    target = row.target
    return ResultObject(
        bench=row.bench,
        subject=row.subject,
        setting=_setting(row, row.setting),
        figure=row.figure,
        unit=row.unit,
        rounds=len(row.samples),
        min=row.low,
        median=row.mid,
        max=row.high,
        note=row.note,
        beside=row.beside or None,
        beside_setting=None if row.beside_setting is None else _setting(row, row.beside_setting),
        target=None if target is None else TargetObject(target.value, target.at_most, row.met),
    )


def _setting(row: Row, setting: Setting) -> SettingObject:
    iotlb = row.bench == "iotlb"
    mapped = iotlb or (row.bench != "vfio" and bool(setting.pages))
    return SettingObject(
        bit=(iotlb or setting.bit) if mapped else None,
        mappings=setting.mappings if mapped else None,
        pages=setting.pages or None,
        depth=setting.depth or None,
        front=setting.front,
        ring="" if row.bench in ("iotlb", "guest", "vfio") else setting.ring,
    )
