# SPDX-License-Identifier: Apache-2.0
"""The front end's side of one vhost-user connection: what is asked, what is answered, and what is acknowledged.

Both channels are served whenever anything is waited for: a back end may ask (MISS) while it owes an answer, and
may owe that answer until it is answered itself. Every wait has an end.
"""

from __future__ import annotations

import collections
import select
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from virtiova import _core
from virtiova.addr import GPA, IOVA, UVA, Access
from virtiova.errors import AccessError, MachineError, ProtocolError
from virtiova.machine.vhost_user.asked import Asked, Counters, Pending
from virtiova.machine.vhost_user.channel import Channel, Gone, close_all
from virtiova.wire.vhost_user import (
    F_PROTOCOL_FEATURES,
    BackendRequest,
    IotlbKind,
    IotlbMessage,
    Message,
    ProtocolFeature,
    Request,
    request_name,
    u64,
    u64_of,
)

REPLY_SECONDS: Final = 3.0
"""How long a back end may take for one answer. It may have to finish a request first."""
MAX_MISSES: Final = 20_000
"""Times that one connection may ask for a translation. An experiment needs tens."""
WANTED: Final = (
    ProtocolFeature.MQ,
    ProtocolFeature.REPLY_ACK,
    ProtocolFeature.BACKEND_REQ,
    ProtocolFeature.CONFIG,
    ProtocolFeature.RESET_DEVICE,
    ProtocolFeature.STATUS,
)
_MAX_WORDS: Final = 20
_KEPT: Final = 4096
_PIECE: Final = 256 * 44

Resolve = Callable[[int, Access], tuple[IOVA, GPA, Access] | None]


class FrontEnd:
    """One connection, from SET_OWNER on. ``resolve`` and ``failed`` are the IOMMU's, ``uva`` is the memory's.
    ``max_misses`` are the times that it may ask for a translation, if not `MAX_MISSES`.

    Raises `MachineError` for a back end that is gone or silent, `ProtocolError` for one that talks nonsense.
    """

    def __init__(
        self,
        sock: socket.socket,
        resolve: Resolve,
        failed: Callable[[int, Access], None],
        uva: Callable[[int], UVA],
        gone: Gone = MachineError,
        max_misses: int | None = None,
    ) -> None:
        self._max_misses = max_misses
        self._main = Channel(sock, "main channel", gone)
        self._gone = gone
        self._back: Channel | None = None
        self._resolve, self._failed, self._uva = resolve, failed, uva
        self._awaited: collections.deque[Pending] = collections.deque()
        self._poll = select.poll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._untold: list[tuple[int, int]] = []
        self._words: list[str] = []
        self._keeps = False
        self._kept: list[int] = []
        """Descriptors that came with a reply, while somebody waits for some."""
        self.counters = Counters()
        self.on_miss: Callable[[Asked], None] = Asked.answer
        """What becomes of a MISS: it is answered at once, unless somebody keeps it for later."""
        self.on_told: Callable[[IotlbMessage], None] = _nobody
        """Hears of each IOTLB message before it is sent."""
        self.asked: collections.deque[IotlbMessage] = collections.deque(maxlen=_KEPT)
        """What the back end asked last, MISS and ACCESS_FAIL, oldest first."""
        self.reply_seconds = REPLY_SECONDS
        """How long an answer is waited for."""
        self.accepted = 0
        """The word of the last SET_FEATURES."""
        self.translating = False
        """Bit 33 is negotiated, so IOTLB messages may be sent."""
        self.protocol = 0
        """The protocol features in use."""
        self._heard = False
        self._begun = False
        """SET_FEATURES was sent. Some acknowledge nothing before they hear there of protocol features (bit 30)."""
        self._watch(self._main.fileno(), self._serve_main)

    def open(self, wanted: Iterable[ProtocolFeature] = WANTED) -> int:
        """The first exchange, with the protocol features that both sides know; the back end's features."""
        features = self.ask(Request.GET_FEATURES)
        if features >> F_PROTOCOL_FEATURES & 1:
            offered = self.ask(Request.GET_PROTOCOL_FEATURES)
            protocol = offered & sum(1 << bit for bit in wanted)
            self.command(Request.SET_PROTOCOL_FEATURES, u64(protocol))
            self.protocol = protocol
        self.command(Request.SET_OWNER)
        if self.speaks(ProtocolFeature.BACKEND_REQ):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            self._back = Channel(ours, "back-end channel", self._gone)
            self._watch(ours.fileno(), self._serve_back)
            with theirs:
                self.command(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        # None of that was acknowledged: whoever went over it is noticed here.
        self.barrier()
        return features

    def speaks(self, feature: ProtocolFeature) -> bool:
        """Is this protocol feature in use?"""
        return bool(self.protocol >> feature & 1)

    @property
    def speaks_at_all(self) -> bool:
        """Are protocol features in use? Only then do rings start disabled."""
        return bool(self.accepted >> F_PROTOCOL_FEATURES & 1)

    def words(self) -> list[str]:
        """What there is to say of the connection."""
        c = self.counters
        said = f"SET_FEATURES 0x{self.accepted:x}, {c.misses} MISS, {c.updates} UPDATE, {c.invalidates} INVALIDATE"
        return [*self._words, f"{said}, {c.failed} without a mapping"]

    def say(self, sentence: str) -> None:
        """Something worth knowing beside the answer."""
        if len(self._words) < _MAX_WORDS:
            self._words.append(sentence)

    # -- asking --------------------------------------------------------------------------------------------------

    def ask(self, request: Request) -> int:
        """A request whose reply is one number."""
        return u64_of(self.exchange(request))

    def exchange(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """A request that has a reply of its own; that reply's payload."""
        return self.wait(self.post(request, payload, fds, need_reply=False))

    def exchange_fds(self, request: Request, payload: bytes = b"") -> tuple[bytes, list[int]]:
        """The same where descriptors come with the reply, which are the caller's."""
        self._keeps = True
        try:
            reply = self.exchange(request, payload)
        finally:
            self._keeps = False
        kept, self._kept = self._kept, []
        return reply, kept

    def command(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> bool:
        """A request without a reply; whether the back end acknowledged it, as far as it can say (REPLY_ACK)."""
        begun = self._begun or request is Request.SET_FEATURES
        if not self.speaks(ProtocolFeature.REPLY_ACK) or not begun:
            self.tell(request, payload, fds)
            return True
        self._begun = True
        return u64_of(self.wait(self.post(request, payload, fds))) == 0

    def tell(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """A request that nobody answers."""
        self._main.send(Message(request, payload, tuple(fds)), REPLY_SECONDS)

    def post(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        need_reply: bool = True,
        then: Callable[[bytes], None] | None = None,
    ) -> Pending:
        """Send a request that the back end is to answer, and go on; it answers in order. ``then`` gets the payload."""
        pending = Pending(request, then=then)
        self._awaited.append(pending)
        self._main.send(Message(request, payload, tuple(fds), need_reply=need_reply), REPLY_SECONDS)
        return pending

    def wait(self, pending: Pending, seconds: float | None = None) -> bytes:
        """The answer to what was posted; `MachineError` if it does not come within ``seconds`` (`reply_seconds`)."""
        seconds = self.reply_seconds if seconds is None else seconds
        deadline = time.monotonic() + seconds
        while pending.payload is None:
            left = deadline - time.monotonic()
            if left <= 0:
                mute = f"the back end did not answer {request_name(pending.request)} within {seconds:g} s"
                # The very first one. Most serve one front end at a time, and let others connect and wait.
                raise self._gone(mute if self._heard else f"{mute}: is another front end connected to it?")
            self.pump(left)
        self._heard = True
        return pending.payload

    def must(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """A request without which nothing goes on; `MachineError` if the back end says no."""
        if not self.command(request, payload, fds):
            raise MachineError(f"the back end refused {request.name}")

    def barrier(self) -> None:
        """Return once the back end has come this far, alive: an acknowledgement alone proves neither."""
        self.ask(Request.GET_FEATURES)

    def stream(self, messages: bytes) -> None:
        """Send IOTLB messages that nobody is to acknowledge, 44 bytes each, and answer meanwhile what is asked.

        None is ever cut: DPDK 22.11 takes a part of one for all of it, and gives up.
        """
        rest = memoryview(messages)
        while rest:
            self._main.send_bytes(rest[:_PIECE], REPLY_SECONDS)
            rest = rest[_PIECE:]
            self.pump(0)

    def expect(self, request: int) -> Pending:
        """The answer to a request that is sent as bytes (`raw`)."""
        pending = Pending(request)
        self._awaited.append(pending)
        return pending

    def raw(self, data: bytes, fds: Sequence[int] = (), *, back: bool = False) -> None:
        """Send bytes as they are, whatever they mean; ``back``: on the back-end channel, if there is one."""
        channel = self._back if back else self._main
        if channel is not None:
            channel.send_bytes(data, REPLY_SECONDS, fds)

    @property
    def filenos(self) -> list[int]:
        """The descriptors of the channels that may have something to say."""
        back = self._back
        return [self._main.fileno(), *([back.fileno()] if back is not None and back.fileno() in self._handlers else [])]

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Whatever it is, on the main channel."""
        self._main.send_bytes(data, REPLY_SECONDS, fds)

    def send_back(self, data: bytes) -> None:
        """Whatever it is, on the back-end channel, if there is one."""
        if self._back is not None:
            self._back.send_bytes(data, REPLY_SECONDS)

    def set_features(self, word: int, *, translating: bool) -> bool:
        """SET_FEATURES; whether the back end took it. What it is to forget is told once it may be told."""
        self.accepted = word
        taken = self.command(Request.SET_FEATURES, u64(word))
        self.translating = translating and taken
        if self.translating:
            untold, self._untold = self._untold, []
            for base, size in untold:
                self.invalidate(base, size)
        return taken

    def invalidate(self, base: int, size: int) -> None:
        """INVALIDATE, and wait for the acknowledgement. Kept for later while bit 33 is not negotiated."""
        if not self.translating:
            self._untold.append((base, size))
            return
        pending = self.post_invalidate(base, size)
        if pending is not None and u64_of(self.wait(pending)) != 0:
            self.say(f"INVALIDATE 0x{base:x}+0x{size:x} was answered with a failure")

    def post_invalidate(self, base: int, size: int) -> Pending | None:
        """INVALIDATE, without waiting; None where the back end cannot acknowledge (REPLY_ACK)."""
        self.counters.invalidates += 1
        return self.post_iotlb(IotlbMessage(IOVA(base), size, UVA(0), Access.NONE, IotlbKind.INVALIDATE), None)

    def post_update(
        self, iova: int, size: int, uva: int, allowed: Access, then: Callable[[bytes], None] | None = None
    ) -> Pending | None:
        """UPDATE, asked for or not, without waiting; ``then`` gets the acknowledgement. None, and ``then`` never comes,
        where the back end cannot acknowledge (REPLY_ACK)."""
        self.counters.updates += 1
        return self.post_iotlb(IotlbMessage(IOVA(iova), size, UVA(uva), allowed, IotlbKind.UPDATE), then)

    def post_iotlb(self, message: IotlbMessage, then: Callable[[bytes], None] | None = None) -> Pending | None:
        """An IOTLB message, as it is, without waiting. None where the back end cannot acknowledge (REPLY_ACK)."""
        self.on_told(message)
        if not self.speaks(ProtocolFeature.REPLY_ACK):
            self.tell(Request.IOTLB_MSG, message.encode())
            return None
        return self.post(Request.IOTLB_MSG, message.encode(), then=then)

    # -- being asked ---------------------------------------------------------------------------------------------

    def pump(self, seconds: float) -> bool:
        """Serve whatever comes first within ``seconds``; whether anything did."""
        ready = self._poll.poll(max(0.0, seconds * 1000))
        for fd, _ in ready:
            handler = self._handlers.get(fd)
            if handler is not None:
                handler()
        return bool(ready)

    def watch(self, fd: int, handler: Callable[[], None]) -> None:
        """Call ``handler`` from `pump` when ``fd`` has something."""
        self._watch(fd, handler)

    def unwatch(self, fd: int) -> None:
        """No longer."""
        if self._handlers.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def _watch(self, fd: int, handler: Callable[[], None]) -> None:
        self._poll.register(fd, select.POLLIN)
        self._handlers[fd] = handler

    def _serve_main(self) -> None:
        messages = self._main.receive()
        if self._keeps:
            # At most as many as come with one message, and nobody keeps them for longer than he waits.
            self._kept += [fd for message in messages for fd in message.fds]
        else:
            _without_fds(messages)
        for message in messages:
            if not message.reply or not self._awaited or self._awaited[0].request != message.request:
                wanted = request_name(self._awaited[0].request) if self._awaited else "nothing"
                name = request_name(message.request)
                raise ProtocolError(f"the back end answered {name} where {wanted} was to be answered")
            pending = self._awaited.popleft()
            pending.payload = message.payload
            if pending.then is not None:
                pending.then(message.payload)

    def _serve_back(self) -> None:
        back = self._back
        if back is None:
            return
        try:
            messages = back.receive()
        except MachineError as error:
            # It may do without: whoever has what he needs no longer has to ask.
            self.say(str(error))
            self.unwatch(back.fileno())
            return
        for message in _without_fds(messages):
            self._backend_message(message)

    def _backend_message(self, message: Message) -> None:
        if message.request != BackendRequest.IOTLB_MSG:
            # CONFIG_CHANGE and the like: nothing that an experiment waits for.
            self._answer(message, ok=message.request == BackendRequest.CONFIG_CHANGE_MSG)
            return
        asked = IotlbMessage.decode(message.payload)
        if asked.kind is IotlbKind.ACCESS_FAIL:
            self.asked.append(asked)
            self._failed(asked.iova, asked.perm)
            self._answer(message, ok=True)
            return
        if asked.kind is not IotlbKind.MISS:
            raise ProtocolError(f"the back end sent {asked.kind.name} on its channel; MISS and ACCESS_FAIL are its own")
        self.asked.append(asked)
        self.counters.misses += 1
        limit = MAX_MISSES if self._max_misses is None else self._max_misses
        if self.counters.misses > limit:
            raise MachineError(f"the back end asked for a translation {limit} times")
        self.on_miss(Asked(self, message, asked))

    def look_up(self, iova: int, access: Access) -> tuple[IOVA, UVA, Access] | None:
        """What the tables say: the page, where it is in our own memory, and all that it allows."""
        if not self.translating:
            # Its own answer to a bit that it was never given shows in the bytes, not in what it asks.
            self.say(f"MISS 0x{iova:x} without bit 33: answered with a failure")
        found = self._resolve(iova, access) if self.translating else None
        if found is None:
            return None
        page, gpa, allowed = found
        try:
            return page, self._uva(gpa), allowed
        except AccessError:
            # Mapped to memory that the back end was not given, or no longer has.
            return None

    def reply(self, message: Message, *, ok: bool) -> None:
        """Answer a MISS, where an answer is wanted."""
        self.counters.failed += not ok
        self._answer(message, ok=ok)

    def _answer(self, message: Message, *, ok: bool) -> None:
        if message.need_reply and self._back is not None:
            self._back.send(message.acknowledge(ok), REPLY_SECONDS)

    def close(self) -> None:
        """Close both channels. May be called more than once."""
        self._handlers.clear()
        kept, self._kept = self._kept, []
        close_all(kept)
        self._main.close()
        if self._back is not None:
            self._back.close()


def _nobody(_: IotlbMessage) -> None:
    pass


def _without_fds(messages: list[Message]) -> list[Message]:
    """No message to a front end that we know brings descriptors: what comes is closed before anything else."""
    for message in messages:
        close_all(message.fds)
    return messages


def drain(fd: int) -> bool:
    """Take what an eventfd has counted; whether there was anything. Never waits for long: whether a read waits is a
    flag that both ends share, so that who sets it first and reads then can still be made to wait."""
    return _core.hear(fd) > 0
