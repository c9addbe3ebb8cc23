# SPDX-License-Identifier: Apache-2.0
"""Rows as a Parquet file, in row groups: never all of them in memory. Needs ``virtiova[fleet]`` (pyarrow)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Final

from virtiova.errors import NotPossibleError

_GROUP: Final = 10_000
"""Rows in one group."""
_TEXTS: Final = ("machine", "view", "device", "type", "address", "dma", "iommu", "group", "driver", "backend")
_BITS: Final = ("offered", "accepted", "backend_offered", "backend_accepted")


def check() -> None:
    """`NotPossibleError` if it cannot be written here: known before the work, not after it."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise NotPossibleError("Parquet needs pyarrow: pip install '.[fleet]' from a checkout") from error


def pieces(rows: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    """The rows of `report.fleet.rows` as a file, in pieces. It goes through a file without a name: what is at the end
    of a Parquet file says where all else is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(pa)
    left = iter(rows)
    with tempfile.TemporaryFile(prefix="virtiova-") as file:
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            while group := list(islice(left, _GROUP)):
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
        file.seek(0)
        while piece := file.read(1 << 20):
            yield piece


def _schema(pa: Any) -> Any:
    finding = pa.struct([(name, pa.string()) for name in ("id", "severity", "title", "ignored")])
    return pa.schema(
        [
            *((name, pa.string()) for name in _TEXTS),
            *((name, pa.bool_()) for name in _BITS),
            ("predicted", pa.list_(pa.string())),
            ("observed", pa.string()),
            ("verdict", pa.string()),
            ("sources", pa.list_(pa.string())),
            ("platform", pa.list_(pa.string())),
            ("findings", pa.list_(finding)),
            ("problems", pa.list_(pa.string())),
        ],
        metadata={"schema": "virtiova/scan/1"},
    )
