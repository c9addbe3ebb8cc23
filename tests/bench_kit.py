# SPDX-License-Identifier: Apache-2.0
"""What tests of the benchmark share: its command, a document, and nobody who listens."""

from __future__ import annotations

import sys
from dataclasses import replace

from virtiova.bench.rows import Document, Row, Setting, Target
from virtiova.bench.subjects import NET, TESTPMD


def quiet(_: str) -> None:
    pass


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "virtiova", "bench", *words]


def example() -> Document:
    setting = Setting(2000, 8192, 128, "poll")
    row = Row("net", NET.name, setting, "requests/s", "1/s", (1e6, 2e6, 3e6))
    return Document(
        [
            row,
            replace(row, figure="latency, median", unit="us", samples=(1.0, 2.0, 3.0)),
            replace(row, figure="latency, 99 %", unit="us", samples=(123456.0,)),
            replace(row, figure="ratio", unit="x", samples=(1.5,), beside=TESTPMD.name, target=Target(2.0)),
            replace(row, subject=TESTPMD.name, samples=(), note="n/a: no dpdk-testpmd (apt install dpdk-dev) " * 4),
            Row("iotlb", NET.name, Setting(60_000), "pair", "us", (0.5,)),
            Row("iotlb", NET.name, Setting(60_000), "pair, acknowledged", "us", (0.5,)),
            Row("iotlb", NET.name, Setting(60_000), "miss", "us"),
        ],
        ["about"],
        ["a reason"],
    )
