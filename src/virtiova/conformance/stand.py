# SPDX-License-Identifier: Apache-2.0
"""The stand: one connection to a back end under test, brought up as a case wants it, and the words for its verdict."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NoReturn

from virtiova.addr import IOVA, PAGE_SIZE, Access
from virtiova.conformance.case import CaseFailedError, CaseUnclearError
from virtiova.conformance.own import own
from virtiova.driver.base import QUEUE_SIZE, Buffer, Driver
from virtiova.driver.open import driver_class
from virtiova.errors import MachineError, ProtocolError
from virtiova.features import VIRTIO_F_ACCESS_PLATFORM, Feature, has
from virtiova.machine.backend import BackEnd
from virtiova.machine.vhost_user.asked import Asked, Pending
from virtiova.machine.vhost_user.connection import Running
from virtiova.machine.vhost_user.frontend import REPLY_SECONDS, WANTED, FrontEnd
from virtiova.machine.vhost_user.machine import VhostUserMachine
from virtiova.probe.canary import TwinRegion, Watch
from virtiova.probe.rig import LENGTH, SILENT_SECONDS, NotApplicableError, Rig, Watched
from virtiova.result import Witness
from virtiova.wire.vhost_user import ProtocolFeature

END_SECONDS: Final = 0.2
"""How long a process that falls over its front end's words may take to be gone."""
MISS_SECONDS: Final = 1.0
"""How long a back end may take to ask for what it needs."""


class Stand(Rig):
    """A `Rig` whose machine is a vhost-user front end of ours, with all its parts in reach.

    A request is waited for whatever else is refused meanwhile.
    ``front`` speaks, ``tables`` is the IOMMU that it asks, ``memory`` and ``registers`` are the rest of the machine.
    """

    ends_with_fault = False

    def __init__(
        self, running: Running, backend: BackEnd, machine: VhostUserMachine, parent: Stand | None = None
    ) -> None:
        super().__init__(machine)
        self.vhost = machine
        self.front = machine.front
        self.tables = machine.iotlb
        self.memory = machine.memory
        self.registers = machine.registers
        self.kind = machine.kind
        self.held: list[Asked] = []
        """Misses that wait, after `hold`."""
        self._question: _Question = _Question(machine.front) if parent is None else parent._question
        self._question.front = machine.front
        self.witnesses: list[Witness] = []
        self._running = running
        self._backend = backend

    @property
    def asking(self) -> bool:
        """The ordinary works: what goes wrong from now on is an answer. One for all connections of a case."""
        return self._question.asking

    @asking.setter
    def asking(self, value: bool) -> None:
        self._question.asking = value

    @property
    def spoken(self) -> FrontEnd:
        """The connection on which the question was put: the last one of the case."""
        return self._question.front

    def words(self) -> list[str]:
        """What the back end printed, and what went over that connection."""
        return self._running.words() + self.spoken.words()

    # -- the verdict ---------------------------------------------------------------------------------------------

    def fail(self, seen: str) -> NoReturn:
        """The back end does what it must not, or not what it must."""
        raise CaseFailedError(seen)

    def unclear(self, seen: str, *readings: str) -> NoReturn:
        """The specification allows it in one of the ``readings``, and forbids it in another."""
        raise CaseUnclearError(seen, *readings)

    def skip(self, why: str) -> NoReturn:
        """The case makes no sense here."""
        raise NotApplicableError(why)

    # -- what a case needs ---------------------------------------------------------------------------------------

    def need(self, *features: ProtocolFeature) -> None:
        """The question is about these protocol features."""
        for feature in features:
            if not self.front.speaks(feature):
                self.skip(f"the back end does not have the protocol feature {feature.name}")

    def need_feature(self, feature: Feature) -> None:
        """The question is about a feature of the device, which has to be offered."""
        if not has(self.vhost.offered, feature):
            self.skip(f"the back end does not offer {feature.name}")

    def need_bit33(self) -> None:
        """The question is about an accepted bit 33."""
        if not has(self.vhost.offered, VIRTIO_F_ACCESS_PLATFORM):
            self.skip("the back end does not offer bit 33")
        self.need_writes()

    def need_writes(self) -> None:
        """The question is about a buffer that the device fills."""
        if not driver_class(self.transport.device_id).writes:
            self.skip("this device fills no buffer of the driver's choice")

    @property
    def acknowledges(self) -> bool:
        """Whether the back end says what becomes of a message (REPLY_ACK)."""
        return self.front.speaks(ProtocolFeature.REPLY_ACK)

    def need_second_queue(self) -> int:
        """The question is about two queues that do the same: how many queues one driver has."""
        each = 2 if self.kind in ("net", "console") else 1
        if self.registers.queues < 2 * each:
            self.skip("the back end has no second queue of the kind")
        return each

    # -- bringing up ---------------------------------------------------------------------------------------------

    def translating(self, *, size: int = QUEUE_SIZE, start: bool = True, leave: Iterable[Feature] = ()) -> None:
        """Bit 33 accepted, the IOMMU on, the rings started, and one request to show that all that works."""
        self.need_bit33()
        self.enable_iommu()
        if self.negotiate(leave=leave).refused or not self.front.translating:
            raise MachineError(f"bit 33 is not taken{': ' * bool(self.registers.refusal)}{self.registers.refusal}")
        if start:
            self.start(size=size)
            self.prove()

    def plain(self, *, size: int = QUEUE_SIZE) -> None:
        """Bit 33 left alone, although it may be offered; the rings started, and one request that works."""
        self.negotiate(take=False)
        self.start(size=size)
        self.prove("B")

    def working(self, *, size: int = QUEUE_SIZE) -> None:
        """Up, with bit 33 if it is offered, else without."""
        if has(self.vhost.offered, VIRTIO_F_ACCESS_PLATFORM):
            self.translating(size=size)
        else:
            self.need_writes()
            self.plain(size=size)

    @property
    def home(self) -> str:
        """The page in which bytes belong: "A" where addresses are translated, else "B"."""
        return "A" if self.front.translating else "B"

    def prove(self, page: str = "A") -> None:
        """One request works, and its bytes land in ``page``: without that a case has no answer."""
        watched = self.write()
        if not watched.done or self.pages(watched) != page:
            landed = self.pages(watched) or "nowhere"
            raise MachineError(f"an ordinary request was {_done(watched)}, and its bytes went to {landed}, not {page}")
        self.asking = True

    def second(self, each: int, *, size: int = QUEUE_SIZE) -> Driver:
        """A driver of the queues behind those of the first one; before DRIVER_OK, so after ``start(ok=False)``."""
        return self.new_driver(size=size, first=each)

    # -- requests ------------------------------------------------------------------------------------------------

    def write(
        self,
        buffers: Sequence[Buffer] | None = None,
        watches: Sequence[Watch] | None = None,
        *,
        driver: Driver | None = None,
        seconds: float = 2.0,
    ) -> Watched:
        """Let the device write to ``buffers``, the usual page X if none are named, and look where its bytes land."""
        painted = self.paint_data() if watches is None else watches
        request = own((driver or self.driver).make_device_write(buffers or [(self.data.addr, LENGTH)]))
        watched = self.observe(request, painted, seconds=seconds)
        self.witnesses = watched.witnesses
        return watched

    def silent(self, buffers: Sequence[Buffer] | None = None, watches: Sequence[Watch] | None = None) -> Watched:
        """The same where nothing ought to happen: wait no longer than that takes to be seen."""
        return self.write(buffers, watches, seconds=SILENT_SECONDS)

    def pages(self, watched: Watched, role: str = "data") -> str:
        """The letters of the pages in that role that the device wrote to, in order; empty: to none."""
        return "".join(sorted({w.page for w in watched.witnesses if w.touched and w.role == role}))

    def must_land(self, watched: Watched, page: str, what: str) -> None:
        """Fail unless a request was done and its bytes are in ``page`` and nowhere else; ``what`` says what it was."""
        landed = self.pages(watched)
        if not watched.done or landed != page:
            self.fail(
                f"{what}: the request was {_done(watched)}, its bytes are in {landed or 'no page'}, wanted {page}"
            )

    def must_not_land(self, watched: Watched, pages: str, what: str) -> None:
        """Fail if any byte is in one of ``pages``."""
        if landed := "".join(sorted(set(self.pages(watched)) & set(pages))):
            self.fail(f"{what}: bytes are in page {landed}")

    def must_not_go_around(self, watched: Watched, what: str) -> None:
        """Fail if any byte, of data or of a ring, is at a bare address."""
        if roles := sorted({w.role for w in watched.witnesses if w.touched and w.page == "B"}):
            self.fail(f"{what}: bytes are at the bare address ({', '.join(roles)})")

    def pump(self, seconds: float) -> None:
        """Serve the back end for so long."""
        self.machine.wait(lambda: False, seconds)

    # -- the IOMMU -----------------------------------------------------------------------------------------------

    def hold(self, *pages: int) -> None:
        """From now on misses wait in `held`: those in the 4 KiB pages at ``pages``, or all."""
        numbers = {page // PAGE_SIZE for page in pages}

        def keep(asked: Asked) -> None:
            if not numbers or asked.iova // PAGE_SIZE in numbers:
                self.held.append(asked)
            else:
                asked.answer()

        self.front.on_miss = keep

    def release(self) -> None:
        """Answer what waits, and from now on at once."""
        self.front.on_miss = Asked.answer
        held, self.held = self.held, []
        for asked in held:
            asked.answer()

    def await_miss(self, page: int, seconds: float = MISS_SECONDS) -> Asked | None:
        """The first miss in the 4 KiB page at ``page`` that waits, taken out; None if none comes in time."""

        def find() -> Asked | None:
            return next((asked for asked in self.held if asked.iova // PAGE_SIZE == page // PAGE_SIZE), None)

        self.machine.wait(lambda: find() is not None, seconds)
        found = find()
        if found is not None:
            self.held.remove(found)
        return found

    def update(self, iova: int, size: int, gpa: int, allowed: Access = Access.RW) -> bool:
        """Tell of a mapping that was not asked for, past the tables; whether that was acknowledged."""
        return self._acknowledged(self.front.post_update(iova, size, self.memory.uva(gpa), allowed))

    def invalidate(self, iova: int, size: int) -> bool:
        """Take back what was told, past the tables; whether that was acknowledged."""
        return self._acknowledged(self.front.post_invalidate(iova, size))

    def _acknowledged(self, pending: Pending | None) -> bool:
        if pending is None:
            return True
        self.front.wait(pending)
        return pending.ok

    def unmap(self, region: TwinRegion) -> None:
        """Take a region out of the tables, and the back end is told."""
        self.tables.unmap(IOVA(region.addr), region.size)
        self.tables.invalidate()

    def remap(self, region: TwinRegion, access: Access = Access.RW) -> None:
        """Point it at its pages A again, with that permission, and the back end is told of the change."""
        self.ops.map(region, access)
        self.tables.invalidate()

    def misses(self, page: int) -> int:
        """How often the back end has asked for that page (of the last 4096 times that it asked at all)."""
        return sum(asked.iova // PAGE_SIZE == page // PAGE_SIZE for asked in self.front.asked)

    def asks(self, page: int, before: int = 0) -> int:
        """How often it asks for that page, more than the ``before`` times that it had; waits for the first time."""
        self.machine.wait(lambda: self.misses(page) > before, MISS_SECONDS)
        return self.misses(page) - before

    # -- other connections ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def again(self, *, wanted: Iterable[ProtocolFeature] = WANTED, packed: bool = False) -> Iterator[Stand]:
        """Hang up, and come back as another front end would: with other protocol features, or packed rings. A back end
        that serves one connection is started anew for that, as it is by `dial`."""
        self._anew()
        machine = VhostUserMachine(self._backend, packed=packed, running=self._running, wanted=wanted)
        with machine:
            other = Stand(self._running, self._backend, machine, self)
            try:
                yield other
            finally:
                self.witnesses = other.witnesses

    @contextlib.contextmanager
    def dial(self) -> Iterator[FrontEnd]:
        """Hang up, and connect again without a word: what is said, and in which order, is the case's own."""
        with self._dial() as front:
            self._question.front = front
            yield front

    @contextlib.contextmanager
    def _dial(self) -> Iterator[FrontEnd]:
        self._anew()
        with self._running.connect() as sock:
            tables = self.tables
            front = FrontEnd(sock, tables.resolve, tables.failed, self.memory.uva, self._running.gone)
            try:
                yield front
            finally:
                front.close()

    def _anew(self) -> None:
        """Hang up. A back end that serves one connection ends with it, which may take it down, and is started anew."""
        self.hang_up()
        if self._running.again:
            return
        if seen := self.crashed():
            self.fail(seen)
        self._running.restart()

    def come_back(self, *, wanted: Iterable[ProtocolFeature] = WANTED, kill: bool = False) -> None:
        """Hang up, and connect again with the same memory, tables and rings, which are to be started; ``kill``: of a
        back end that we started, another process."""
        self.hang_up()
        if not self._running.again:
            self.skip("the back end ends with its connection")
        if kill and self.ours:
            self._running.restart()
        self.vhost.reconnect(wanted)
        self.front = self._question.front = self.vhost.front

    @property
    def again_possible(self) -> bool:
        """Whether there can be another connection."""
        return self._running.again

    @contextlib.contextmanager
    def plug(self) -> Iterator[socket.socket]:
        """Hang up, and connect again as bytes: whatever is sent is the case's own."""
        self.hang_up()
        if not self._running.again:
            self.skip("the back end was given its only connection")
        with self._running.connect() as sock:
            sock.settimeout(REPLY_SECONDS)
            yield sock

    @property
    def ours(self) -> bool:
        """Whether the back end is ours to kill."""
        return self._running.process is not None

    def descriptors(self) -> int:
        """How many descriptors the back end's process has open; 0 if that cannot be known."""
        process = self._running.process
        try:
            return 0 if process is None else len(os.listdir(f"/proc/{process.pid}/fd"))
        except OSError:
            return 0

    def hang_up(self) -> None:
        """Close the connection; memory and tables stay."""
        self.registers.close()
        self.front.close()

    def still_there(self) -> str:
        """Hang up, and fail unless the back end is there for the next front end; the words that say so."""
        self.hang_up()
        self.asking = True
        process = self._running.process
        code = None if process is None else process.exit_code(0.0 if self._running.again else END_SECONDS)
        if code is not None and (code < 0 or self._running.again):
            self.fail(self._ended(code))
        if not self._running.again:
            return "its process is in order" if code is None else f"its process ended with {code}"
        try:
            with self._dial() as front:
                front.barrier()
        except (MachineError, ProtocolError) as error:
            code = None if process is None else process.exit_code(END_SECONDS)
            self.fail(f"no other front end is served after it: {error}" if code is None else self._ended(code))
        return "the next front end is served"

    def _ended(self, code: int) -> str:
        how = f"by signal {-code}" if code < 0 else f"with exit status {code}"
        words = self._running.words()
        return f"its process ended {how}" + (f": {words[-1][:200]}" if words else "")

    def crashed(self) -> str:
        """How the process ended, if it did by a signal; else nothing."""
        process = self._running.process
        code = None if process is None else process.exit_code(END_SECONDS)
        return self._ended(code) if code is not None and code < 0 else ""

    @contextlib.contextmanager
    def may_hang_up(self) -> Iterator[None]:
        """What is said here is wrong, so that the back end may close the connection over it, or refuse it."""
        with contextlib.suppress(MachineError, ProtocolError):
            yield


class _Question:
    """What all stands of a case share: whether the question is put, and the connection on which it was put last."""

    def __init__(self, front: FrontEnd) -> None:
        self.front = front
        self.asking = False


def drained_first(stand: Stand) -> NoReturn:
    """A ring was not stopped while a request waited for an answer that has been given now. Fails if it is not even
    stopped then."""
    stand.front.barrier()
    stand.unclear(
        "the ring was stopped once the request that waited for a translation had its answer",
        "what is under way is brought to an end before a ring is stopped, and that takes the answer",
        "a front end that stops a device need not answer before it has stopped",
    )


def _done(watched: Watched) -> str:
    return "done" if watched.done else "not done"
