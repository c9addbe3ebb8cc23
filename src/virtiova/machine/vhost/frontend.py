# SPDX-License-Identifier: Apache-2.0
"""The front end of a kernel back end: its file, and the IOTLB messages that go over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from virtiova.addr import IOVA, PAGE_SIZE, UVA, Access
from virtiova.errors import MachineError
from virtiova.features import VIRTIO_F_ACCESS_PLATFORM, has
from virtiova.machine.vhost.device import CallError, VhostFile
from virtiova.machine.vhost.memory import OwnMemory
from virtiova.machine.vhost_user.iotlb import IotlbServer
from virtiova.wire.vhost import BackendFeature
from virtiova.wire.vhost_user import IotlbKind, IotlbMessage

MAX_MISSES: Final = 20_000
"""Times that it may ask for a translation in all. An experiment needs tens."""
_AT_ONCE: Final = 256
_MAX_WORDS: Final = 20


class KernelFrontEnd:
    """What is asked and told, from SET_OWNER on. ``make`` makes a device; `renew` gives it back and has another, which
    is all the reset that there is: a file that took bit 33 once looks its addresses up from then on, whatever it is
    told afterwards; RESET_OWNER would end that, and is vhost-net's only. ``wanted`` are the interface's features that
    are taken where they are offered.
    """

    def __init__(
        self,
        make: Callable[[], VhostFile],
        iotlb: IotlbServer,
        memory: OwnMemory,
        wanted: BackendFeature = BackendFeature.IOTLB_MSG_V2,
    ) -> None:
        self._make = make
        self.resolve = iotlb.resolve
        """What becomes of a MISS: the tables', unless somebody listens."""
        self._memory = memory
        self._wanted = wanted
        self._words: list[str] = []
        self.misses = self.updates = self.invalidates = self.failed = 0
        """What went over the file, of all of them; ``failed`` are misses that were answered with nothing."""
        self.accepted = 0
        """The word of the last SET_FEATURES that the kernel took."""
        self.file = make()
        iotlb.tell = self.invalidate
        try:
            self._own()
        except BaseException:
            self.close()
            raise

    def renew(self) -> None:
        """Give the device back, with all that it knows, and have another."""
        self.file.close()
        self.accepted = 0
        self.file = self._make()
        self._own()

    def _own(self) -> None:
        self.file.own()
        self.file.set_backend_features(self._wanted & self.file.backend_features())

    @property
    def translating(self) -> bool:
        """Whether bit 33 was taken: only then are there IOTLB messages."""
        return has(self.accepted, VIRTIO_F_ACCESS_PLATFORM)

    def set_features(self, word: int) -> str:
        """Take features; why not, in the kernel's words, or nothing if it did."""
        try:
            self.file.set_features(word)
        except CallError as error:
            self.say(str(error))
            return str(error)
        self.accepted = word
        return ""

    def serve(self) -> int:
        """Answer what it asks for now, as the tables say; how often that was with a mapping. What is not mapped is not
        answered: the kernel then waits, as for a platform that takes its time."""
        answered = 0
        for _ in range(_AT_ONCE):
            message = self.file.asked()
            if message is None:
                break
            self.misses += 1
            if self.misses > MAX_MISSES:
                raise MachineError(f"{self.file.path}: asked more than {MAX_MISSES} times for a translation")
            answered += self._answer(message)
        return answered

    def _answer(self, message: IotlbMessage) -> bool:
        found = self.resolve(message.iova, message.perm)
        if found is None:
            self.failed += 1
            return False
        iova, gpa, allowed = found
        self.updates += 1
        update = IotlbMessage(iova, PAGE_SIZE, self._memory.uva(gpa), allowed, IotlbKind.UPDATE)
        self.file.tell(update)
        return True

    def invalidate(self, base: int, size: int) -> None:
        """Take back what it was told of a range. It has done so when this returns."""
        if self.translating:
            self.invalidates += 1
            self.file.tell(IotlbMessage(IOVA(base), size, UVA(0), Access.NONE, IotlbKind.INVALIDATE))

    def say(self, line: str) -> None:
        """Note something for the evidence."""
        if len(self._words) < _MAX_WORDS:
            self._words.append(line)

    def words(self) -> list[str]:
        """What there is to say."""
        counts = f"{self.misses} MISS, {self.updates} UPDATE, {self.invalidates} INVALIDATE"
        return [*self._words, f"SET_FEATURES 0x{self.accepted:x}, {counts}, {self.failed} without a mapping"]

    def close(self) -> None:
        """Give it back. May be called more than once."""
        self.file.close()
