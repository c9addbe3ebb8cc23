# SPDX-License-Identifier: Apache-2.0
"""What a server has counted, for its log and for whoever asks by a signal."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """All since the server started, over all connections."""

    connections: int = 0
    requests: int = 0
    """Chains given back to the driver."""
    bytes: int = 0
    """Bytes of their buffers that were read or written."""
    kicks: int = 0
    calls: int = 0
    looks: int = 0
    """How often Python has looked at a ring, for one request or many."""
    waits: int = 0
    """Of these, how often nothing could be done before the front end answers: at most once a look."""
    misses: int = 0
    """Pages that the front end was asked for."""
    updates: int = 0
    invalidates: int = 0
    faults: int = 0
    """Requests of which a part could not be reached: refused by the front end, or outside of all memory."""
    access_fails: int = 0
    """Of these, those of which the front end was told that a mapping did not allow them."""
    refusals: int = 0
    """Messages of the front end that were refused."""
    broken: int = 0
    """Rings that made no sense, and were stopped until they are set up again."""
    resumed: int = 0
    """Requests that a back end before this one had begun, or this one before its ring was stopped."""
    native: int = 0
    """Of the requests: those that a queue's thread served."""
    helps: int = 0
    """How often a queue's thread left something to Python."""
    invalidate_us: int = 0
    """Longest time from the arrival of an INVALIDATE to its acknowledgement, in microseconds."""

    def as_dict(self) -> dict[str, int]:
        """By name."""
        return dataclasses.asdict(self)

    def text(self) -> str:
        """One line for people."""
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.as_dict().items())

    def json(self) -> str:
        """One line of JSON."""
        return json.dumps({"schema": "virtiova/serve/1", **self.as_dict()})
