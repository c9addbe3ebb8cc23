# SPDX-License-Identifier: Apache-2.0
"""Mistakes in negotiation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mutant_kit import in_python, mutant, offering, patch
from virtiova.dma.iotlb import Iotlb
from virtiova.dma.space import FlatSpace, MediatedSpace
from virtiova.features import Feature
from virtiova.serve import events
from virtiova.serve.host import Host
from virtiova.serve.session import Session
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import ConfigSpace, ProtocolFeature, Request


@mutant("unoffered-bit")
def trusts_that_bits_were_offered() -> None:
    """A bit that it does not know ends the process."""

    def set_features(self: Session, message: wire.Message) -> events.Event:
        features = wire.u64_of(message.payload)
        if features & ~self._offer.features:
            raise SystemExit("assertion failed: a feature that was not offered")
        self.features = features
        return events.FeaturesSet(self._token(message), features)

    patch(Session, "_set_features", lambda _: set_features)


def without_bit33() -> None:
    """It does not offer the bit."""
    offering(lambda offer: replace(offer, features=offer.features & ~(1 << Feature.ACCESS_PLATFORM)))


@mutant("unoffered-bit33", given=without_bit33)
def takes_the_bit_for_nothing() -> None:
    """It acknowledges the bit, which it knows nothing of, and takes addresses for guest-physical ones."""
    in_python(lambda host: FlatSpace(host.ram))


@mutant("bit33-without-version1")
def takes_it_for_legacy() -> None:
    """Without VERSION_1 it does not translate."""
    in_python(
        lambda host: MediatedSpace(host.ram, host.iotlb) if host._device.has(Feature.VERSION_1) else FlatSpace(host.ram)
    )


@mutant("bit33-without-channel")
def cannot_ask_and_guesses() -> None:
    """With nobody to ask it takes addresses as they are."""
    in_python(lambda host: FlatSpace(host.ram) if host.misses is None else MediatedSpace(host.ram, host.iotlb))


@mutant("bit33-without-reply-ack")
def gets_no_answer_and_guesses() -> None:
    """Without REPLY_ACK it thinks that there is no IOMMU."""
    in_python(
        lambda host: (
            MediatedSpace(host.ram, host.iotlb)
            if host.session.agreed(ProtocolFeature.REPLY_ACK)
            else FlatSpace(host.ram)
        )
    )


@mutant("features-twice")
def starts_over_at_each_features() -> None:
    """Each SET_FEATURES resets the rings."""

    def anew(original: Any) -> Any:
        def set_features(self: Host, features: int) -> None:
            for ring in self.rings:
                ring.reset()
            original(self, features)

        return set_features

    patch(Host, "_set_features", anew)


@mutant("bit33-renegotiated")
def remembers_the_first_negotiation() -> None:
    """Once it has translated it goes on to."""
    translated = []

    def chosen(self: Host, behind: bool) -> Any:
        translated.append(behind)
        return MediatedSpace(self.ram, self.iotlb) if any(translated) else FlatSpace(self.ram), None

    patch(Host, "_space", lambda _: chosen)


@mutant("old-translations")
def deaf_while_stopped() -> None:
    """It hears of no INVALIDATE while no ring runs, and forgets nothing by itself."""

    def listening(original: Any) -> Any:
        def perform(self: Host, event: events.Event) -> bool:
            if isinstance(event, events.IotlbInvalidated) and not any(ring.started for ring in self.rings):
                return False
            return bool(original(self, event))

        return perform

    in_python()
    patch(Host, "_perform", listening)
    patch(Host, "take", lambda _: lambda self, messages: (0, 0))
    patch(Host, "forget_translations", lambda _: lambda self: setattr(self, "_platform", None))
    patch(Iotlb, "flush", lambda _: lambda self: None)


@mutant("reply-ack")
def answers_unasked() -> None:
    """It acknowledges a call descriptor whether that was asked for or not."""
    patch(
        Session,
        "_acknowledged",
        lambda original: lambda self, message: message.request == Request.SET_VRING_CALL or original(self, message),
    )


@mutant("reset-device")
def goes_on_after_a_reset() -> None:
    """RESET_DEVICE is acknowledged, and rings run on."""
    patch(Host, "_reset", lambda _: lambda self: None)


@mutant("status")
def keeps_the_status_for_ever() -> None:
    """Bits of the status are never cleared."""

    def set_status(self: Session, message: wire.Message) -> events.Event:
        status = wire.u64_of(message.payload)
        self.status |= status
        return events.StatusSet(self._token(message), status)

    patch(Session, "_set_status", lambda _: set_status)


@mutant("config-read")
def ignores_the_offset() -> None:
    """Each piece of the configuration is its first bytes."""

    def other(original: Any) -> Any:
        def other_event(self: Host, event: events.Event) -> bool:
            if isinstance(event, events.ConfigRead):
                data = self._device.config().ljust(event.size, b"\0")[: event.size]
                self.session.answer(event.token, ConfigSpace(event.offset, event.flags, data).encode())
                return True
            return bool(original(self, event))

        return other_event

    patch(Host, "_other_event", other)
