# SPDX-License-Identifier: Apache-2.0
"""The native half: memory accesses that Python cannot express, and a table of where they go. Offsets are in bytes.

Every sized access is exactly one machine access (``load_pair``: two of 64 bits) at a naturally
aligned offset. An offset out of range or misaligned raises ``IndexError``, any access after `Window.release`
``ValueError``, a value that does not fit ``OverflowError``; memory is untouched then.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, Self, final

from typing_extensions import Buffer, disjoint_base

class _IntervalRows(Protocol):
    """What `Answers` wants of an interval map: the lists that it is made of, to be changed in place."""

    def __len__(self) -> int: ...
    @property
    def load(self) -> int:
        """The most that there are in a row."""

    def rows(self) -> tuple[list[int], list[list[int]], list[Any]]:
        """The first start of each row; the starts in each; the intervals: start, end, target, permission."""

    def changed(self, by: int) -> None:
        """There are so many more."""

@final
class Window:
    """A writable C-contiguous buffer, held until `release`.

    ``BufferError`` if it is read-only or has gaps, ``ValueError`` if it does not begin at a multiple of 8.
    The sized accesses are little-endian in memory, or big-endian with ``swap``, whatever the host is.
    """

    def __new__(cls, buffer: object) -> Self: ...
    def __len__(self) -> int: ...
    def release(self) -> None:
        """Let go of the buffer. May be called more than once. ``BufferError`` while a `Radix` leads here."""

    def read(self, offset: int, length: int) -> bytes:
        """Copy ``length`` bytes out, in no promised order and size."""

    def write(self, offset: int, data: bytes) -> None:
        """Copy bytes in, in no promised order and size: never for what the other side polls."""

    def load16(self, offset: int, swap: bool = False) -> int:
        """Acquire load of an unsigned 16-bit value."""

    def load32(self, offset: int, swap: bool = False) -> int:
        """Acquire load of an unsigned 32-bit value."""

    def load_pair(self, offset: int) -> bytes:
        """16 bytes as they lie in memory, each aligned half loaded once, the first one first."""

    def store16(self, offset: int, value: int, swap: bool = False) -> None:
        """Release store of an unsigned 16-bit value."""

    def store32(self, offset: int, value: int, swap: bool = False) -> None:
        """Release store of an unsigned 32-bit value."""

    def or8(self, offset: int, bits: int) -> None:
        """Set bits of one byte and leave the others, in one access that is sequentially consistent."""

@final
class Mapping:
    """``length`` bytes of the file ``fd`` from ``offset`` on, mapped shared, to read and write, through windows.

    Not ``writable``: nothing may write through a window of it.

    ``fd`` may be closed afterwards. ``OSError`` says what the kernel said. If the file is shortened, an
    access behind its new end does not end the process with SIGBUS: ``page`` bytes (what the kernel maps
    at once) of anonymous memory take the place of what is gone, and `faults` counts it. A SIGBUS
    elsewhere goes to whoever handled the signal before.
    """

    def __new__(cls, fd: int, offset: int, length: int, page: int, *, writable: bool = True) -> Self: ...
    def window(self, offset: int, length: int) -> Window:
        """A window of these bytes. ``ValueError`` after `close`, ``IndexError`` if they are not all inside."""

    def close(self) -> None:
        """Unmap it. May be called more than once. ``BufferError`` while a window was not released."""

    @property
    def faults(self) -> int:
        """How many pages were replaced since it was mapped; 0 when closed."""

def faults() -> int:
    """How many pages were replaced in all `Mapping` of this process: a change says that one of them was shortened."""

def tell(fd: int) -> bool:
    """Notify whoever is at the other side of an eventfd or pipe, who shares it and may do with it what he likes.

    Whether he could be told: yes if there is no room for more, as he has not looked yet. Where he makes the write
    wait that ends after 0.1 s, by a signal that nobody handles: one of ``SIGRTMIN`` to ``SIGRTMAX``, taken for that.
    """

def hear(fd: int) -> int:
    """Take the notifications that are at an eventfd or pipe: 1 if there were some, 0 if none, -1 at the end of a pipe.

    ``OSError`` if it cannot be read. Waits no longer than `tell`.
    """

@final
class Radix:
    """A cache of I/O virtual addresses (IOVA), below 2**48, and where they lead: leaves of 4 KiB, 2 MiB, 1 GiB.

    What is not in it, whatever the reason, is answered with None or False, and memory is untouched then.
    ``allowed`` and ``needed`` are values of ``Access``: 1 read, 2 write. One access moves at most
    ``limit`` bytes. Has at most 16 MiB of tables, and starts anew when they are full.
    """

    def __new__(cls, limit: int) -> Self: ...
    def behind(self, gate: Gate) -> None:
        """Change from now on only while ``gate`` keeps its workers out."""

    def fill(self, address: int, first: int, last: int, window: Window, offset: int, allowed: int) -> int:
        """Enter the largest leaf around ``address`` of an interval that lies at ``offset`` of ``window``.

        The interval is from ``first`` to ``last``, both included. Returns the leaf's size in bytes, also for a page of
        which the interval has only the beginning, and no more is entered; or 0 if there is none: an interval that
        begins within the page, not below 2**48, or its memory not at a multiple of 4096.
        """

    def fill_all(self, first: int, last: int, window: Window, offset: int, allowed: int, limit: int) -> int:
        """Enter the leaves of an interval as `fill` would, from its beginning on, but ``limit`` of them at most.

        Nothing else is forgotten for that: without room it ends early. Returns how many leaves it entered.
        """

    def drop(self, first: int, last: int) -> None:
        """Forget all leaves that have a byte from ``first`` to ``last``, both included."""

    def clear(self) -> None:
        """Forget everything, and let the windows go."""

    @property
    def tables(self) -> int:
        """How many tables of 4 KiB there are."""

    def covers(self, address: int, length: int, needed: int) -> bool:
        """Whether all of these bytes are in here with that permission."""

    def read(self, address: int, length: int) -> bytes | None:
        """Copy bytes out, all or none."""

    def write(self, address: int, data: bytes) -> bool:
        """Copy bytes in, all or none; whether it did."""

    def load16(self, address: int, swap: bool = False) -> int | None:
        """Acquire load of an unsigned 16-bit value. Not one of an odd address."""

    def load_pair(self, address: int) -> bytes | None:
        """16 bytes at a multiple of 16, each half loaded once, the first one first."""

    def store16(self, address: int, value: int, swap: bool = False) -> bool:
        """Release store of an unsigned 16-bit value; whether it did."""

    def store32(self, address: int, value: int, swap: bool = False) -> bool:
        """Release store of an unsigned 32-bit value; whether it did."""

@final
class Answers:
    """Runs of a front end's IOTLB messages, put into ``intervals`` and ``radix`` as Python would, where it is simple.

    Simple is an UPDATE within one region where no interval is or exactly that one, and an INVALIDATE of one interval
    or none; each a vhost-user message of 44 bytes. ``make`` makes an interval of start, end, target and permission;
    one UPDATE enters at most ``eager`` leaves.
    """

    def __new__(
        cls, radix: Radix, intervals: _IntervalRows, make: Callable[[int, int, int, int], object], eager: int
    ) -> Self: ...
    def memory(self, regions: Sequence[tuple[int, int, int, Window]]) -> None:
        """All regions, by user address: that, bytes, the GPA, and the window that they are the whole of."""

    def take(self, data: Buffer, room: int) -> tuple[int, int, int, int]:
        """Do the leading messages in ``data`` that are simple, with at most ``room`` intervals in all.

        Returns how many they were; how many updates, invalidations, and messages that want a reply, which is success.
        """

@final
class Pump:
    """Waits for descriptors, and does what comes of plain IOTLB messages by itself, acknowledgements included."""

    def wait(
        self,
        fds: list[tuple[int, int]],
        milliseconds: int,
        answers: Answers | None = None,
        most: int = 0,
        heard: Callable[[bytes], bool] | None = None,
        channel: int = -1,
        answered: Callable[[bytes], bool] | None = None,
    ) -> list[tuple[int, int]]:
        """``poll``: of ``fds``, with the events that are wanted, those where something is; -1: however long it takes.

        With ``answers``, the first is the front end's socket. What `Answers.take` would take of it, with at most
        ``most`` intervals, is taken and acknowledged; then ``heard`` gets the messages, and says whether there is
        something to do; so ``answered`` for what has come by the socket ``channel``, which is one of ``fds``. The wait
        ends then, and if there is anything else, or as many messages as others should wait for. What comes with a
        descriptor is left there, and so is the end. `OSError` as of ``poll``; `ProtocolError` if
        somebody else reads from the socket.
        """

    @property
    def updates(self) -> int:
        """How many there were in the last wait."""

    @property
    def invalidates(self) -> int:
        """How many there were in the last wait."""

    @property
    def longest(self) -> int:
        """Nanoseconds from finding messages with an invalidation in the socket to their acknowledgement, at most."""

    @property
    def unsent(self) -> bytes:
        """Of the acknowledgements what the socket had no room for, to be sent before anything else."""

def fence() -> None:
    """A sequentially consistent fence."""

@final
class Request:
    """A descriptor chain that came out of a `Drain`: what ``ring.chain.Chain`` is, natively, with the same errors.

    All its bytes are known to be reachable. Once it was given back, or what any address meant has changed, whatever
    touches memory raises ``ValueError``.
    """

    @property
    def head(self) -> int:
        """The ring's own name for it: head descriptor (split) or buffer id (packed)."""

    @property
    def length(self) -> int:
        """How many buffers it has."""

    @property
    def readable(self) -> int:
        """Bytes from the driver that were not read yet."""

    @property
    def writable(self) -> int:
        """Bytes of room for the driver that were not written yet."""

    @property
    def written(self) -> int:
        """Bytes written without a gap from the start."""

    @property
    def moved(self) -> int:
        """Bytes read and written so far."""

    def read(self, n: int | None = None) -> bytes:
        """The next ``n`` bytes from the driver, all that is left if None; fewer if there are not so many."""

    def write(self, data: bytes) -> None:
        """Write ``data`` to the driver's next bytes. `ProtocolError`, with nothing written, if there is less room."""

    def skip(self, n: int) -> None:
        """Leave the next ``n`` bytes of room as they are. `ProtocolError` if there is less room."""

@final
class Drain:
    """The device end of a ring natively: takes requests that are well-formed and wholly in ``radix``, nothing else.

    ``desc``, ``avail`` and ``used`` are the addresses of the three parts in ``radix`` (packed: descriptor ring,
    driver's and device's event suppression), ``size`` the number of entries. A ring that is not aligned, or not below
    2**48, is none that it takes anything from. Whatever it does not do (`needs_help`) is left for the same ring's end
    in Python, which goes on at `state` and gives it back.
    """

    def __new__(
        cls,
        radix: Radix,
        desc: int,
        avail: int,
        used: int,
        size: int,
        *,
        packed: bool = False,
        event_idx: bool,
        indirect: bool,
        in_order: bool = False,
    ) -> Self: ...
    @property
    def radix(self) -> Radix:
        """Where its addresses lead."""

    @property
    def state(self) -> tuple[int, int, int]:
        """Where it stands: next available and next used entry, and how many were given back since the driver was told.

        May be set, where all that was pushed was published. Packed: bit 15 is the wrap counter.
        """

    @state.setter
    def state(self, state: tuple[int, int, int]) -> None: ...
    @property
    def taken(self) -> int:
        """Requests that were taken and neither pushed nor put back."""

    @property
    def needs_help(self) -> bool:
        """Whether the last `pop` or `enable_notify` ended at something that is Python's to do or to judge."""

    def note_in(self, window: Window | None, offset: int = 0, entries: int = 0, counter: int = 0) -> None:
        """Note what is in flight at ``offset`` of ``window``, as ``serve.inflight`` does; None: do not.

        ``entries``: how many there is room for; ``counter``: the highest there. The window stays until then.
        """

    @property
    def counter(self) -> int:
        """The number of the request that was noted last. May be set."""

    @counter.setter
    def counter(self, counter: int) -> None: ...
    def pop(self, limit: int) -> list[Request]:
        """Up to ``limit`` requests, each noted as taken. Fewer: the ring has no more, or `needs_help`."""

    def put_back(self, requests: list[Request]) -> None:
        """Forget that these, the last ones that were popped, in that order, were taken: they are popped again."""

    def give(self, request: Request) -> int:
        """`push` with all that was written; how many bytes it has moved."""

    def push(self, request: Request, written: int) -> None:
        """Give a request back, and let the driver see it. `AccessError` if the used ring is out of reach."""

    def push_all(self, requests: Iterable[tuple[Request, int]]) -> None:
        """`push` for several, which the driver sees all at once."""

    def missing(self, chains: int) -> tuple[int, list[tuple[int, int, int]]]:
        """What of the next ``chains`` chains is not in the table: address, length, and 1 to be read or 2 to be written.

        Of one whose indirect table is not there, that. Before that, how many of these parts are the first chain's.
        Nothing if the first of them is not well-formed, or is there.
        """

    def needs_interrupt(self) -> bool:
        """Whether the driver wants to hear of what was pushed since the last call. True if its wish is out of reach."""

    def disable_notify(self) -> None:
        """Ask the driver not to kick. A hint only."""

    def enable_notify(self) -> bool:
        """Ask for a kick with the next request, then look once more. False: sleep; True: more, or `needs_help`."""

@disjoint_base
class Engine:
    """What the worker of one queue runs in place of `Device.handle`, without Python: see ``engine.h``.

    Subclasses are native. A device has one for each queue, and keeps it as long as it may be used.
    """

    @property
    def running(self) -> bool:
        """Whether a worker has it."""

    @property
    def begun(self) -> int:
        """Chains that it took and has not given back, as of the last step. While no worker has it."""

    @property
    def fd(self) -> int:
        """What to wait for besides the ring, to be readable; -1 for nothing. While no worker has it."""

    def left(self) -> list[tuple[int, bytes | None]]:
        """Chains that it took and could not give back, in that order: Python's to give back now. Said once.

        The head of each; and what was read for it, b"" if it was done and had nothing to read, None if it was not done.
        """

    def step(self, drain: Drain, budget: int = 64) -> tuple[int, int, int, int]:
        """Do up to ``budget`` chains of ``drain`` here, while no worker has either, and let the driver see them.

        How it ended (`EMPTY`, `GOT`, `HELP`, `WAIT` or `ARMED`), then chains, bytes and dropped frames.
        """

def uring_travels() -> bool:
    """Whether this kernel lets a process send a ring of io_uring to another one (Linux before 6.7).

    One that a front end sends is not restricted. ``OSError`` where there is no io_uring.
    """

@final
class Disk(Engine):
    """A queue of a disk of ``size`` bytes: reads and writes that go well, of at most ``most`` bytes each.

    The disk is ``window``, which cannot be released meanwhile, or the file ``fd``, which stays the caller's to close
    later. ``mapping``, if the window is of a file: once that was shortened, or has no room for what is written, all is
    left to Python. ``uring``: what would have to wait for the file is done by io_uring, restricted to that file; else
    Python does it. ``ValueError`` for neither or both, ``OSError`` where there is no io_uring or it is forbidden.
    """

    def __new__(
        cls,
        size: int,
        most: int,
        *,
        window: Window | None = None,
        mapping: Mapping | None = None,
        fd: int = -1,
        uring: bool = False,
    ) -> Self: ...
    @property
    def uring(self) -> bool:
        """Whether what would have to wait is done by io_uring."""

    def serve(self, drain: Drain, budget: int, nanoseconds: int) -> tuple[int, int, int]:
        """Do up to ``budget`` chains here, none begun after so long, while no worker has either.

        How it ended, then chains and bytes. `EMPTY`: the driver was asked for a kick. What would have to wait for the
        file is left as it was: `HELP`.
        """

    def close(self) -> None:
        """Let go of the file; nothing is under way afterwards. ``ValueError`` while a worker has it."""

    always_later: bool
    """Whether io_uring does also what would not have to wait. Set while no worker runs it."""
    may_write: bool
    """Whether writes are done here, and are over when they are in the cache. Set while no worker runs it."""

@final
class Gate:
    """Keeps workers out while what they use is changed: a context, which may be entered within itself.

    Inside, no worker is at work, nor begins to. To enter takes as long as what they are at: a batch at most. One that
    is held up for longer, by a notification (`tell`), is interrupted.
    """

    @property
    def closed(self) -> bool:
        """Whether it is entered now."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...

@final
class Worker:
    """A thread of its own, without Python, that serves one ring by one engine, inside of ``gate``.

    The ring is the worker's from `run` to `take`, or until it asks: then it writes to the eventfd ``help`` and waits.
    What it has done is in the drain's state, to be looked at only when the ring is not its own. ``OSError`` if the
    system has no thread or descriptor for it.
    """

    def __new__(cls, gate: Gate, help: int) -> Self: ...
    def spin(self, nanoseconds: int, fixed: bool = False) -> None:
        """How long it looks out for work before it sleeps: always so long, or up to that, as has been of use."""

    def run(
        self,
        drain: Drain,
        engine: Engine,
        kick: int,
        call: int,
        polled: bool = False,
        *,
        bell: int = -1,
        request: int = 0,
        ring: int = 0,
    ) -> None:
        """Let it go on with a ring. Descriptors stay the caller's, -1 for none; ``polled``: no kicks come.

        ``bell``: the driver is told by the ``ioctl`` ``request`` on it, with the number ``ring``; by ``call`` only if
        that fails.

        ``ValueError`` if it has a ring, has ended, or the engine is none.
        """

    def take(self) -> bool:
        """The ring is the caller's again, with nothing under way; whether it was not before."""

    def left(self) -> list[tuple[int, bytes | None]]:
        """`Engine.left` of the engine that it ran, after `take`."""

    @property
    def running(self) -> bool:
        """Whether it has a ring and goes on with it."""

    @property
    def asks(self) -> int:
        """Why it gave the ring away by itself, ``WHY_CHAIN`` to ``WHY_CALL``; 0 if it did not, or since `take`."""

    @property
    def problem(self) -> int:
        """``errno`` with ``WHY_KICK``; 0 for the end of the file."""

    @property
    def tally(self) -> dict[str, int]:
        """What it has done so far: requests, bytes, kicks, calls, dropped; and helps, slept, spun."""

    def close(self) -> None:
        """End the thread. May be called more than once."""

@final
class Lookout:
    """Looks out for requests before the one thread of several rings sleeps: for ``nanoseconds`` at most.

    Always so long if ``fixed``, else as long as has been of use.
    """

    def __new__(cls, nanoseconds: int, fixed: bool = False) -> Self: ...
    def look(self, drains: list[Drain], fds: list[int]) -> bool:
        """Whether there is something in one of the rings. False also as soon as one of ``fds`` can be read.

        Without the GIL; whoever else has it leaves the drains and their table alone. Nothing is taken.
        """

    def came(self) -> None:
        """Work has come, by whatever way: how long that took is remembered."""

WHY_CHAIN: int
"""The next chain of the ring is one for Python."""
WHY_KICK: int
"""No kicks come any more."""
WHY_FAULT: int
"""A file was shortened under somebody."""
WHY_CALL: int
"""The driver cannot be told of what is done. Said once for a descriptor."""

EMPTY: int
"""The ring has no more."""
GOT: int
"""The budget is used up."""
HELP: int
"""The next chain is Python's to do."""
WAIT: int
"""Nothing to do before something comes from outside."""
ARMED: int
"""The ring has not as many as are wanted, and the driver was asked for a kick with the next one."""

@final
class Backlog:
    """Frames that wait for a driver's buffers, up to ``limit`` (65536 at most) of 65550 bytes, in memory of ours."""

    def __new__(cls, limit: int) -> Self: ...
    def __len__(self) -> int: ...
    def append(self, frame: bytes) -> bool:
        """Keep a frame, at the end; whether there was room. An empty one is none; one that is too large is dropped."""

    @property
    def first(self) -> int:
        """Bytes of the first frame; 0 if there is none."""

    def popleft(self) -> bytes:
        """Take the first frame. ``IndexError`` if there is none."""

    def clear(self) -> None:
        """Forget them all."""

    def drop(self) -> None:
        """Count a frame that was dropped."""

    @property
    def limit(self) -> int:
        """How many may wait."""

    @property
    def dropped(self) -> int:
        """How many were dropped, here and by an engine."""

@final
class Wire:
    """Where a network device's engines send frames to and take them from: one of four kinds. ``fd`` stays the caller's.

    `DISCARD`: nowhere, without ``fd``. `SOCKET`: a connected datagram socket. `NAMED`: a datagram socket that sends to
    the socket at the path ``name``. `TAP`: anything that takes and gives a frame with each ``write`` and ``read``, and
    does not wait. ``ValueError`` for what does not fit together.
    """

    DISCARD: int
    SOCKET: int
    NAMED: int
    TAP: int
    def __new__(cls, kind: int, fd: int = -1, name: bytes = b"") -> Self: ...
    def close(self) -> None:
        """``fd`` is about to be closed: use it no more. Not while a worker runs an engine on it."""

    @property
    def frames(self) -> int:
        """Frames of the driver's that went this way."""

    @property
    def bytes(self) -> int:
        """Bytes of those frames."""

    @property
    def lost(self) -> int:
        """How many of those frames found nobody."""

@final
class Transmit(Engine):
    """The engine of a network device's queue 1 (``net.h``): `device.net.Net`, for what is well-formed."""

    def __new__(cls, wire: Wire) -> Self: ...
    def set_up(self, header: int) -> None:
        """Bytes of ``struct virtio_net_hdr``, 12 at most. While no worker has it."""

    @property
    def dropped(self) -> int:
        """Frames that were larger than any may be."""

@final
class Receive(Engine):
    """The engine of a network device's queue 0 (``net.h``), with the frames that wait for it."""

    def __new__(cls, wire: Wire, log: Backlog) -> Self: ...
    def set_up(self, header: int, mergeable: bool) -> None:
        """As `Transmit.set_up`; whether a frame may take several buffers."""
