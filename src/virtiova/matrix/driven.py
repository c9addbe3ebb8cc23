# SPDX-License-Identifier: Apache-2.0
"""A vDPA disk that a guest's own kernel drives, and what came of a file system on it: from what was seen to a cell."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import msgspec

from virtiova.addr import AddressKind
from virtiova.errors import ProtocolError
from virtiova.policy import RULES, Facts, Front, Rules, predict
from virtiova.result import Cell, Evidence, Path, path_order

_FEATURES_OK: Final = 8
_FILES: Final = 100
_WORDS: Final = 300


class Use(msgspec.Struct, frozen=True):
    """Files that were written, and the names of those that came back wrong: at once, and after another mount."""

    files: int
    wrong: list[str]
    changed: list[str]


class Image(msgspec.Struct, frozen=True):
    """The same files as they are behind the device, and which are wrong there."""

    files: int
    wrong: list[str]


class Whole(msgspec.Struct, frozen=True):
    """Checksums of all of it, through the device and behind it."""

    disk: str
    image: str


class Negotiated(msgspec.Struct, frozen=True, rename={"bit33": "bit-33"}):
    """What the driver has accepted, by sysfs."""

    bit33: bool
    status: int
    driver: str


class Used(msgspec.Struct, frozen=True):
    """All of it (`guest.disk_in_use.round_on`), how often the DMA API was called for the device, and the last words of
    whoever serves it."""

    negotiated: Negotiated
    use: Use
    image: Image
    whole: Whole
    dma_map: int
    said: str

    @property
    def data_right(self) -> bool:
        """Did all come back, and arrive?"""
        lost = [*self.use.wrong, *self.use.changed, *self.image.wrong]
        counted = 0 < self.use.files == self.image.files < _FILES
        return counted and not lost and bool(self.whole.disk) and self.whole.disk == self.whole.image


def used(said: object) -> Used:
    """What a guest says, if it has that form. `ProtocolError` if not."""
    try:
        return msgspec.convert(said, Used)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"the guest sent what is no use of a disk: {error}") from error


def judged(cell: Cell, seen: Used, rules: Rules = RULES) -> Cell:
    """``cell``, which has the names, with what became of the device.

    A process that serves such a device has no memory of the guest but what the kernel maps for it (VDUSE), and the
    kernel maps what its driver passed through the DMA API. So bytes that arrive were translated if that was called,
    and nothing can be said of them if it was not.
    """
    accepted = seen.negotiated.bit33
    prediction = predict(Facts(offered=accepted or None, accepted=accepted, front=Front.TRANSLATING), rules)
    mapped = seen.dma_map > 0
    kind = AddressKind.IOVA if mapped else AddressKind.UNKNOWN
    observed = Path.TRANSLATED if seen.data_right and mapped else Path.UNKNOWN
    sentence = f"{seen.use.files} files on ext4, {'all right' if seen.data_right else 'not all right'} on both sides"
    sentence += f", {seen.dma_map} DMA API calls"
    disagreements = []
    if mapped and prediction.address is not kind:
        disagreements.append(f"{prediction.address} addresses are predicted, {kind} addresses were seen")
    return replace(
        cell,
        offered=True if accepted else None,
        accepted=accepted,
        address=kind,
        predicted=path_order(prediction.paths),
        observed=observed,
        evidence=Evidence(
            transfer="write",
            features_ok=bool(seen.negotiated.status & _FEATURES_OK),
            live="the file system has what was written to it" if seen.data_right else "",
            note="" if observed is not Path.UNKNOWN else sentence,
            inside={"driver": seen.negotiated.driver[:_WORDS], "dma_map": str(seen.dma_map)},
            outside={"seen": sentence, "served": seen.said[:_WORDS]},
        ),
        reasons=list(prediction.reasons),
        disagreements=disagreements,
    )
