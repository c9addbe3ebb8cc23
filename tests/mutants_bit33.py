# SPDX-License-Identifier: Apache-2.0
"""Mistakes about bit 33 itself."""

from __future__ import annotations

from dataclasses import replace

from mutant_kit import in_python, mutant, offering, patch
from virtiova.dma.space import FlatSpace, MediatedSpace
from virtiova.serve.host import Host
from virtiova.wire.vhost_user import ProtocolFeature


@mutant("bit33-offered")
def offered_without_a_channel() -> None:
    """It offers the bit, and cannot ask."""
    offering(lambda offer: replace(offer, protocol=offer.protocol & ~(1 << ProtocolFeature.BACKEND_REQ)))


@mutant("translate")
def takes_the_bit_and_goes_around() -> None:
    """It accepts the bit, and takes every address for a guest-physical one."""
    in_python(lambda host: FlatSpace(host.ram))


@mutant("bit33-declined")
def translates_what_it_offered() -> None:
    """It translates although the driver left the bit alone."""
    patch(Host, "_space", lambda _: lambda self, behind: (MediatedSpace(self.ram, self.iotlb), None))
