# SPDX-License-Identifier: Apache-2.0
"""A frame that may have been lost is sent again, but not before the one before was used: a device that had no time to
look finds one frame, and not all of them."""

from __future__ import annotations

import pytest

from virtiova.driver import net


class Clock:
    """Seconds, as a test wants them."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_not_before_the_one_before_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(net, "time", clock)
    sent: list[float] = []
    used = False
    repeat = net._Repeat(lambda: sent.append(clock.now), lambda: used)
    repeat.now()

    def pass_(seconds: float) -> None:
        end = clock.now + seconds
        while clock.now < end:
            clock.now += 0.001
            repeat()

    pass_(5.0)
    assert len(sent) == 1, "the machine is busy with something else"
    used = True
    pass_(net._AGAIN_SECONDS / 2)
    assert len(sent) == 1, "it may be asking for what it missed"
    pass_(net._AGAIN_SECONDS)
    assert len(sent) == 2
    pass_(5.0)
    assert len(sent) == net._TIMES, "and not for ever"
