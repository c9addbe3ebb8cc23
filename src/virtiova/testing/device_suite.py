# SPDX-License-Identifier: Apache-2.0
"""The checks of a device: any `virtiova.device.base.Device`, whatever it is for."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from hypothesis import strategies as st

from virtiova.addr import PAGE_SIZE, Access, DmaAddr
from virtiova.device.base import Device
from virtiova.dma.ops import RamRegion
from virtiova.features import Status
from virtiova.ring.chain import Chain
from virtiova.ring.ends import Segment
from virtiova.testing.checks import EXAMPLES, Check, Effort, NotApplicable, Report, choose, run, search
from virtiova.testing.device_asks import KNOWN, default_asks
from virtiova.testing.device_stand import Answer, Ask, Cut, Laid, Platform, Stand
from virtiova.testing.ring_world import Op
from virtiova.testing.spaces import payload

MOST_CONFIG: Final = 4096
HUGE: Final = 1 << 28
"""Bytes that a chain claims to have room for, and has not."""
MOST_MEMORY: Final = 1 << 26
"""Bytes that a device may take at a time, whatever a chain claims."""
ON: Final = Platform()


@dataclass(frozen=True, slots=True)
class _Subject:
    make: Callable[[], Device]
    requests: Sequence[Ask] | None

    def asks(self) -> Sequence[Ask]:
        """What is asked of it."""
        return default_asks(self.make()) if self.requests is None else self.requests

    def reference(self) -> list[tuple[Ask, Answer]]:
        """What it answers when nothing is odd: the bytes only if a second one says the same."""
        runs = []
        for _ in range(2):
            stand = Stand(self.make, ON)
            runs.append([(ask, self.answered(stand, ask)) for ask in self.asks()])
            stand.check_stray()
        same = []
        for (ask, one), (_, other) in zip(*runs, strict=True):
            if ask.answer is not None and one.data != ask.answer:
                raise stand.wrong(f"{ask.name}: wrote {one.data!r:.80}, wanted {ask.answer!r:.80}")
            same.append((ask, one if one == other else Answer(one.length)))
        return same

    def answered(self, stand: Stand, ask: Ask, cut: Cut | None = None) -> Answer:
        """What it answers to a request that it has to answer."""
        answer = stand.ask(ask, cut)
        if answer.length is None and self.requests is None and int(stand.device.device_id) not in KNOWN:
            raise NotApplicable("does not answer to any bytes: say what it answers to (`requests`)")
        if answer.broken:
            raise stand.wrong(f"{ask.name}: needs a reset: {answer.broken}")
        if answer.length is None:
            raise stand.wrong(f"{ask.name}: was not used")
        return answer

    def expect(self, stand: Stand, ask: Ask, wanted: Answer, cut: Cut | None = None) -> None:
        """The same answer as without anything odd."""
        self.same(stand, ask, self.answered(stand, ask, cut), wanted)

    @staticmethod
    def same(stand: Stand, ask: Ask, answer: Answer, wanted: Answer) -> None:
        """Raise `Wrong` if it is another answer."""
        if answer.length != wanted.length:
            raise stand.wrong(f"{ask.name}: promised {answer.length} bytes, wanted {wanted.length}")
        if wanted.data and answer.data != wanted.data:
            raise stand.wrong(f"{ask.name}: wrote {answer.data!r:.80}, wanted {wanted.data!r:.80}")


Body = Callable[[_Subject, Effort], None]


def _declares(subject: _Subject, effort: Effort) -> None:
    stand = Stand(subject.make, ON)
    device = stand.device
    own = ((1 << 24) - 1) | ((1 << 128) - (1 << 50))
    if device.features & ~own:
        raise stand.wrong(f"offers bits 0x{device.features & ~own:x}, which are not a device's own (virtio 1.4, 2.2)")
    if device.queues < 1:
        raise stand.wrong(f"has {device.queues} queues")
    stand.steps.append("device.config()  # twice")
    one, other = (stand.sane(device.config, "config()") for _ in range(2))
    if len(one) > MOST_CONFIG:
        raise stand.wrong(f"gave {one!r:.60}, wanted at most {MOST_CONFIG} bytes")
    if one != other:
        raise stand.wrong(f"gave {one.hex()}, and then {other.hex()}, although nothing has happened")


def _config_writes(subject: _Subject, effort: Effort) -> None:
    stand = Stand(subject.make, ON)
    size = len(stand.device.config())
    for width in (1, 2, 4):
        for offset in range(0, size - width + 1, width):
            for data in (bytes(width), b"\xff" * width):
                stand.steps[1:] = [f"device.configure({offset}, {data!r})"]
                stand.sane(lambda at=offset, data=data: stand.transport.write_config(at, data), "configure")  # type: ignore[misc]
                if len(stand.device.config()) != size:
                    raise stand.wrong(f"the configuration has {len(stand.device.config())} bytes now, it had {size}")


def _answers(subject: _Subject, effort: Effort) -> None:
    subject.reference()


def _on(platform: Platform) -> Body:
    def body(subject: _Subject, effort: Effort) -> None:
        wanted = subject.reference()
        stand = Stand(subject.make, platform)
        for ask, answer in wanted:
            subject.expect(stand, ask, answer)
        stand.check_stray()

    return body


_CUTS = st.lists(st.integers(0, 700), max_size=3).map(tuple)
_HOW = st.builds(Cut, _CUTS, _CUTS, st.integers(0, 2), st.booleans())
_PLATFORMS = st.builds(Platform, st.booleans(), st.booleans())


def _cut(subject: _Subject, effort: Effort) -> None:
    wanted = subject.reference()

    def play(made: tuple[Cut, Platform]) -> None:
        cut, platform = made
        stand = Stand(subject.make, platform)
        for ask, answer in wanted:
            subject.expect(stand, ask, answer, cut)
        stand.check_stray()

    search(st.tuples(_HOW, _PLATFORMS), play, effort)


def _directions(subject: _Subject, effort: Effort) -> None:
    stand = Stand(subject.make, ON)
    for ask, answer in subject.reference():
        stand.steps.append(f"{ask}; each part may be used in its direction only")
        laid = stand.lay(ask, Cut())
        stand.restrict(laid.source, Access.READ)
        stand.restrict(laid.target, Access.WRITE)
        stand.put(laid, Cut())
        stand.go(ask.queue)
        faults = stand.world.iommu.faults()
        if faults:
            verb = "wrote what is to be read" if faults[0].write else "read what is to be written"
            raise stand.wrong(f"{ask.name}: {verb}")
        subject.same(stand, ask, stand.collect(laid), answer)


def _taken_away(subject: _Subject, effort: Effort) -> None:
    wanted = subject.reference()

    def play(made: tuple[int, int, bool]) -> None:
        number, after, midway = made
        ask = wanted[number % len(wanted)][0]
        stand = Stand(subject.make, ON)
        for each, right in wanted[: number % len(wanted)]:
            subject.expect(stand, each, right)
        cut = Cut((5, 300), (3, 300))
        laid = stand.lay(ask, cut)
        parts = [region for region, size in ((laid.source, len(ask.readable)), (laid.target, ask.writable)) if size]
        for region in parts[after % 2 :][:1] or parts[:1]:
            _lose(stand, region, after // 2 if midway else None)
        stand.put(laid, cut)
        when = f"after {after // 2} accesses" if midway else "before"
        stand.steps.append(f"{ask}; some of it is taken away {when}")
        stand.go(ask.queue)
        stand.tap.after = lambda op: None
        # Whatever it answers, it lives; and what is asked again, with all of it there, is as if nothing had been.
        if stand.transport.read_status() & Status.DEVICE_NEEDS_RESET:
            raise stand.wrong(f"needs a reset: {stand.transport.words[-1]}")
        used = stand.queues[ask.queue].ring.poll()
        if used is None:
            raise stand.wrong("does not give the chain back")
        if used.length > ask.writable:
            raise stand.wrong(f"promised {used.length} bytes, where there is room for {ask.writable}")
        for each, right in wanted:
            subject.expect(stand, each, right)
        stand.check_stray()

    search(st.tuples(st.integers(0, 7), st.integers(0, 9), st.booleans()), play, effort)


def _lose(stand: Stand, region: RamRegion, after: int | None) -> None:
    """Take a region away: at once, or when the device has touched buffers so many times."""
    if after is None:
        stand.take_away(region)
        return
    left = [after]

    def hook(op: Op) -> None:
        inside = any(at <= op.address < at + size for at, size in stand.tap.live[len(stand.queues) :])
        if inside and left[0] >= 0:
            left[0] -= 1
            if left[0] < 0:
                stand.take_away(region)

    stand.tap.after = hook


def _any_request(subject: _Subject, effort: Effort) -> None:
    wanted = subject.reference()

    def play(made: tuple[int, int, int, int, Cut, Platform]) -> None:
        length, number, room, queue, cut, platform = made
        stand = Stand(subject.make, platform)
        data = payload(length, number)
        if number % 2 and wanted:
            # Something like a request, but not one.
            data = (wanted[number % len(wanted)][0].readable + data)[:length]
        ask = Ask("any bytes", data, room, queue % stand.device.queues)
        if not data and not room and not cut.empties:
            return
        stand.ask(ask, cut)
        stand.check_stray()
        stand.steps.append("reset")
        stand.start()
        for each, right in wanted[:1]:
            subject.expect(stand, each, right)

    lengths = st.one_of(st.sampled_from([0, 1, 3]), st.integers(0, 40), st.integers(0, 700))
    search(st.tuples(lengths, st.integers(0, 7), lengths, st.integers(0, 7), _HOW, _PLATFORMS), play, effort)


def _empty(subject: _Subject, effort: Effort) -> None:
    for queue in range(subject.make().queues):
        for name, readable, writable in (("to read", 1, 0), ("to write", 0, 1), ("of both sorts", 1, 1)):
            stand = Stand(subject.make, ON)
            region = stand.alloc(PAGE_SIZE)
            segments = [Segment(DmaAddr(region.addr), 0, False)] * readable
            segments += [Segment(DmaAddr(region.addr + 64), 0, True)] * writable
            stand.queues[queue].ring.add(segments)
            stand.steps.append(f"a chain of nothing but empty buffers {name}, queue {queue}")
            stand.go(queue)
            used = stand.queues[queue].ring.poll()
            if used is not None and used.length:
                raise stand.wrong(f"promised {used.length} bytes, where there is room for none")


def _claims(subject: _Subject, effort: Effort) -> None:
    """Room, and bytes to read, that the driver only claims: as many as one page can be given out again and again."""
    for queue in range(subject.make().queues):
        for write in (True, False):
            stand = Stand(subject.make, ON)
            ask = next((ask for ask in subject.asks() if ask.queue == queue), Ask("", queue=queue))
            source = stand.alloc(PAGE_SIZE)
            source.write(0, ask.readable[:PAGE_SIZE])
            segments = [Segment(DmaAddr(source.addr), len(ask.readable), False)] if ask.readable else []
            big = [Segment(DmaAddr(source.addr), HUGE // 4, write)] * 4
            tail = [Segment(DmaAddr(source.addr + 64), 1, True)]
            stand.queues[queue].ring.add([*segments, *big, *tail])
            stand.tap.live.append((0, 1 << 64))
            words = "has room for" if write else "brings"
            stand.steps.append(f"a chain that {words} 0x{HUGE:x} bytes, as it claims, queue {queue}")
            with _measured() as peak:
                stand.go(queue)
            if peak[0] > MOST_MEMORY:
                raise stand.wrong(f"took more than {MOST_MEMORY >> 20} MiB of memory for it")


@contextlib.contextmanager
def _measured() -> Iterator[list[int]]:
    """The most memory in bytes that Python has while the block runs, beyond what there was."""
    peak = [0]
    ours = not tracemalloc.is_tracing()
    if ours:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        yield peak
    finally:
        peak[0] = tracemalloc.get_traced_memory()[1] - before
        if ours:
            tracemalloc.stop()


def _together(subject: _Subject, effort: Effort) -> None:
    """By `Device.handle_batch`, as hosts do that have many; once with one in between that is out of reach."""
    wanted = subject.reference()
    for lost in (False, True):
        for queue in sorted({ask.queue for ask, _ in wanted}):
            stand = Stand(subject.make, ON)
            if stand.device.wanted(queue) or not stand.device.pending(queue):
                raise NotApplicable("takes as many buffers as its work needs")
            laid = [(stand.lay(ask, Cut()), answer) for ask, answer in wanted if ask.queue == queue]
            chains = [_chain(stand, one) for one, _ in laid]
            stand.steps += [str(one.ask) for one, _ in laid]
            if lost:
                nowhere = (1 << 60, 64)
                stand.tap.live.append(nowhere)
                chains.insert(1, Chain(stand.tap, len(chains), [nowhere], [nowhere]))
                stand.steps.insert(2, "a request that is out of reach")
            stand.steps.append("# all of them by one call of handle_batch()")
            stand.sane(lambda: stand.device.handle_batch(queue, chains), "handle_batch")  # noqa: B023 - called here
            for one, answer in laid:
                (chain,) = (chain for chain in chains if chain.head == one.segments[0].addr)
                got = Answer(chain.written, stand.written(one, chain.written))
                subject.same(stand, one.ask, got, answer)


def _chain(stand: Stand, laid: Laid) -> Chain:
    read, write = (
        [(int(one.addr), one.length) for one in laid.segments if one.write is write] for write in (False, True)
    )
    return Chain(stand.tap, laid.segments[0].addr, read, write)


def _resets(subject: _Subject, effort: Effort) -> None:
    wanted = subject.reference()
    stand = Stand(subject.make, ON)
    for ask, answer in wanted:
        subject.expect(stand, ask, answer)
    laid = [stand.lay(ask, Cut()) for ask, _ in wanted]
    for one in laid:
        stand.put(one, Cut())
        stand.queues[one.ask.queue].ring.publish()
    stand.steps.append("the same in the rings, but not told; then a reset, and all of it is taken away")
    for one in laid:
        for region in (one.source, one.target, one.table):
            stand.free(region)
    stand.start()
    if stand.device.accepted >> 33 & 1 != 1:
        raise stand.wrong("does not keep what was accepted (`Device.accepted`)")
    for ask, answer in wanted:
        subject.expect(stand, ask, answer)
    stand.check_stray()


_ROWS: Final[tuple[tuple[str, str, str, Body], ...]] = (
    ("declares", "it offers bits of its own only, and a configuration that stands still", "virtio 1.4, 2.2", _declares),
    ("config-writes", "whatever is written to the configuration, it lives", "virtio 1.4, 2.5", _config_writes),
    ("answers", "requests are answered, all bytes through the address space", "virtio 1.4, 2.6", _answers),
    ("bit-off", "without bit 33 the answers are the same", "virtio 1.4, 6.1", _on(Platform(bit33=False))),
    ("packed", "in packed rings the answers are the same", "virtio 1.4, 2.8", _on(Platform(packed=True))),
    ("cut", "however requests are cut into buffers, the answers are the same", "virtio 1.4, 2.7.4", _cut),
    (
        "directions",
        "what is to be read is only read, what is to be written only written",
        "virtio 1.4, 2.7.5",
        _directions,
    ),
    ("taken-away", "what is not mapped is no reason to fail; later all is well", "virtio 1.4, 6.1", _taken_away),
    (
        "any-request",
        "any bytes are a request, or leave it in need of a reset; no more",
        "virtio 1.4, 2.1.2",
        _any_request,
    ),
    ("empty", "buffers of no bytes do no harm", "virtio 1.4, 2.7.5", _empty),
    ("claims", "lengths that are only claimed take no memory", "virtiova, Chain", _claims),
    ("together", "several requests at once are answered as one after the other", "virtio 1.4, 2.6", _together),
    ("resets", "after a reset nothing of before is touched, and all is well", "virtio 1.4, 2.4", _resets),
)


def device_checks(
    make: Callable[[], Device],
    *,
    requests: Sequence[Ask] | None = None,
    examples: int = EXAMPLES,
    seed: int = 0,
) -> list[Check]:
    """The checks of `check_device`, one by one: for ``pytest.mark.parametrize("check", ..., ids=str)``."""
    subject, effort = _Subject(make, requests), Effort(examples, seed)

    def bound(body: Body) -> Callable[[], None]:
        return lambda: body(subject, effort)

    return [Check(name, title, citation, bound(body)) for name, title, citation, body in _ROWS]


def check_device(
    make: Callable[[], Device],
    *,
    requests: Sequence[Ask] | None = None,
    only: Iterable[str] | None = None,
    expected: Mapping[str, str] | None = None,
    examples: int = EXAMPLES,
    seed: int = 0,
) -> Report:
    """Check a device on the in-process machine, behind its software IOMMU and without.

    ``make`` gives a new one, in the same state each time; the class itself, if it needs no arguments. ``requests``:
    what it answers to, in an order that makes sense; if None, those of its type, or any bytes. The other arguments are
    those of `check_address_space`.

    Returns what was checked. Raises `CheckFailed` with the steps that show it for each check that fails.
    """
    checks = device_checks(make, requests=requests, examples=examples, seed=seed)
    return run("check_device", choose(checks, only), expected or {})
