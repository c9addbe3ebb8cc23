# SPDX-License-Identifier: Apache-2.0
"""A vhost-user back end as the user names it, and one that we start from its command, for whichever front end."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import shutil
import signal
import socket
import stat
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from virtiova.errors import MachineError, ProtocolError, UsageError
from virtiova.features import DeviceId, Feature, has
from virtiova.machine.image import IMAGE_SECTORS, SECTOR, disk_image
from virtiova.machine.qemu.process import QemuProcess, memory_file
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import Framer, Message, Request

START_SECONDS: Final = 30.0
"""How long a back end may take from its start until it listens."""
ANSWER_SECONDS: Final = 5.0
_GRACE: Final = 0.5
"""Seconds between being asked to end and being made to."""
_ACCEPTING: Final = 0x10000
"""Flag of a listening socket in ``/proc/net/unix``."""
_MARK: Final = "VIRTIOVA_BACK_END"
"""Environment variable by which we know what a back end started, wherever it went."""
_ROUNDS: Final = 10
_ENVIRONMENT: Final = 1 << 20
_LINES: Final = 20
_LAST_WORDS: Final = 3

KINDS: Final = {
    "blk": DeviceId.BLOCK,
    "console": DeviceId.CONSOLE,
    "fs": DeviceId.FS,
    "net": DeviceId.NET,
    "rng": DeviceId.ENTROPY,
}
"""Device types that there is a driver for here, by the name that ``--type`` takes."""
PATH: Final = "{socket}"
SHARE: Final = "{share}"
PLACES: Final = (PATH, "{fd}")
"""How a command names its socket."""
_BEHIND: Final = {"blk": "{image}", "console": "{net}", "fs": "{share}", "net": "{net}"}
"""How it names the other side of a device of that type."""


@dataclass(frozen=True, slots=True)
class BackEnd:
    """A back end. Either ``socket``, a path to connect to, or ``spawn``, a command in which these are put in:
    ``{socket}`` a path to listen on, ``{fd}`` the number of a connected socket, ``{image}`` the path of a disk image
    of ours, ``{share}`` that of a directory of ours, ``{net}`` the number of a datagram socket with one network frame
    (or piece of text) a datagram.

    ``kind`` is the device type (`KINDS`); empty: to be guessed. ``guess`` says what it was guessed from. ``write``
    allows requests that change the disk, ``echo`` says that the network device sends back each frame that it is given.
    ``product`` is the program's name and version for who knows more than the command says.
    """

    socket: str = ""
    spawn: str = ""
    kind: str = ""
    guess: str = ""
    write: bool = False
    echo: bool = False
    product: str = ""

    def check(self) -> None:
        """Raise `UsageError` for what makes no sense."""
        if bool(self.socket) == bool(self.spawn):
            raise UsageError("a vhost-user back end is a socket, or --spawn and a command: one of the two")
        if self.kind and self.kind not in KINDS:
            raise UsageError.unknown("device type", self.kind, KINDS)
        if self.socket and not os.path.exists(self.socket):
            raise UsageError(f"{self.socket}: there is no such socket")
        if self.socket and not stat.S_ISSOCK(os.stat(self.socket).st_mode):
            raise UsageError(f"{self.socket}: is not a socket")
        if self.spawn:
            self.words()

    def words(self, places: Sequence[str] = PLACES) -> list[str]:
        """The command, cut as a shell would. `UsageError` for one that cannot work, or has not one of ``places``."""
        try:
            words = shlex.split(self.spawn)
        except ValueError as error:
            raise UsageError(f"the back end's command: {error}") from None
        if not words or sum(place in self.spawn for place in PLACES) != 1 or not any(map(self.spawn.count, places)):
            raise UsageError(f"the back end's command names its socket, as {' or '.join(places)}")
        if shutil.which(words[0]) is None:
            raise UsageError(f"the back end's command: there is no program {words[0]!r}")
        return words

    def owns(self, kind: str) -> bool:
        """Whether the other side of its device, of type ``kind``, is ours."""
        return kind in _BEHIND and _BEHIND[kind] in self.spawn


class BackEndProcess(QemuProcess):
    """A back end that we started, and whatever it started itself: it leads a process group, which ends with it, and who
    left the group is known by its environment."""

    def __init__(self, argv: Sequence[str], inherit: Sequence[int]) -> None:
        token = secrets.token_hex(16)
        self._mark = f"{_MARK}={token}".encode()
        super().__init__(argv, inherit, {**os.environ, _MARK: token})

    def exit_code(self, seconds: float = 0.0) -> int | None:
        """How it ended, waiting up to ``seconds``; None while it runs. It is left to be reaped by `close`, so that
        its number stays its own until then."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                seen = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return self._process.returncode
            if seen is not None:
                return seen.si_status if seen.si_code == os.CLD_EXITED else -seen.si_status
            if time.monotonic() >= deadline:
                return None
            time.sleep(0.002)

    def close(self) -> None:
        """Ask the group to end, then make it."""
        if self._process.returncode is None:
            self._signal(signal.SIGTERM)
            self.exit_code(_GRACE)
            self._signal(signal.SIGKILL)
            for _ in range(_ROUNDS):
                if not self._end_strays():
                    break
        super().close()

    def _end_strays(self) -> int:
        """End who was started by it and went away; how many that were."""
        found = 0
        for name in os.listdir("/proc"):
            # Whoever has gone by now, or is not ours to look at, is none of them.
            with contextlib.suppress(OSError):
                if not name.isdigit() or int(name) in (self.pid, os.getpid()):
                    continue
                fd = os.pidfd_open(int(name))
                try:
                    with open(f"/proc/{name}/environ", "rb") as file:
                        if self._mark in file.read(_ENVIRONMENT).split(b"\0"):
                            signal.pidfd_send_signal(fd, signal.SIGKILL)
                            found += 1
                finally:
                    os.close(fd)
        return found

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


class Spawned:
    """A back end that runs. Whatever it started itself ends with it, and the folder of its socket goes.

    ``image`` is the descriptor of the disk image, ``net`` that of the socket and ``share`` the path of the directory
    that it gets if its command asks for them; all stay the caller's.
    """

    def __init__(self, backend: BackEnd, image: int, net: int, share: str = "") -> None:
        words = backend.words()
        self._cleanup = contextlib.ExitStack()
        self.process: BackEndProcess | None = None
        self.path = ""
        """Where it is to listen; empty if it was given `connected`."""
        self.connected: socket.socket | None = None
        """Our end of the connection that it was started with."""
        # A path without a name in a file system: it is there for the one who inherits the number.
        values = {"{image}": f"/proc/self/fd/{image}", "{net}": str(net), SHARE: share}
        inherit = [fd for place, fd in (("{image}", image), ("{net}", net)) if place in backend.spawn]
        try:
            with contextlib.ExitStack() as theirs:
                if PATH in backend.spawn:
                    folder = tempfile.mkdtemp(prefix="virtiova-")
                    self._cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
                    self.path = values[PATH] = f"{folder}/socket"
                else:
                    self.connected, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
                    self._cleanup.callback(self.connected.close)
                    inherit.append(theirs.enter_context(end).fileno())
                    values["{fd}"] = str(end.fileno())
                argv = [_filled(word, values) for word in words]
                self.program = os.path.basename(argv[0])
                self.process = BackEndProcess(argv, inherit)
                self._cleanup.callback(self.process.close)
            if self.path:
                self._wait_until_it_listens(self.process)
        except BaseException:
            self.close()
            raise

    def _wait_until_it_listens(self, process: BackEndProcess) -> None:
        # Not by connecting: there are back ends that serve one connection and end.
        deadline = time.monotonic() + START_SECONDS
        while not listens(self.path):
            if process.exit_code() is not None:
                foreground = "; it has to stay in the foreground" if process.exit_code() == 0 else ""
                raise self.gone(f"the back end ended before it listened{foreground}")
            if time.monotonic() > deadline:
                raise self.gone(f"the back end did not listen within {START_SECONDS:g} s")
            time.sleep(0.005)

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.exit_code() is None

    def words(self) -> list[str]:
        """What it said, the last lines."""
        said = "" if self.process is None else self.process.stderr()
        return [line[:300] for line in said.splitlines() if line.strip()][-_LINES:]

    def gone(self, message: str) -> MachineError:
        """An error with the back end's own last words."""
        code = None if self.process is None else self.process.exit_code(0.2)
        how = "it is still running" if code is None else f"exit status {code}"
        words = self.words()
        return MachineError(f"{message} ({how})" + _after(words), "\n".join(words))

    def close(self) -> None:
        """Ask it to end, make it, remove its folder. May be called more than once."""
        # One step that fails, or is interrupted, does not cost the others.
        self._cleanup.close()


def _after(words: Sequence[str]) -> str:
    """Last words as the end of a sentence."""
    return f": {'; '.join(line[:200] for line in words[-_LAST_WORDS:])}" if words else ""


def _filled(word: str, values: dict[str, str]) -> str:
    for place, value in values.items():
        word = word.replace(place, value)
    return word


def listens(path: str) -> bool:
    """Whether somebody listens there, as the kernel says."""
    try:
        with open("/proc/net/unix", encoding="utf-8", errors="replace") as table:
            for line in table:
                fields = line.split()
                if len(fields) >= 8 and fields[7] == path and fields[3].isalnum():
                    return bool(int(fields[3], 16) & _ACCEPTING)
    except OSError:
        return os.path.exists(path)
    return False


def image_file() -> int:
    """The descriptor of a fresh disk image of ours."""
    fd = memory_file("virtiova-image", IMAGE_SECTORS * SECTOR)
    os.pwrite(fd, disk_image(IMAGE_SECTORS), 0)
    return fd


def offers(backend: BackEnd) -> bool:
    """Does it offer bit 33? It is started for the question, and ended. `MachineError` if it does not say."""
    with contextlib.ExitStack() as stack:
        image = image_file()
        stack.callback(os.close, image)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        stack.callback(ours.close)
        stack.callback(theirs.close)
        spawned = Spawned(backend, image, theirs.fileno())
        stack.callback(spawned.close)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            try:
                sock.connect(spawned.path)
                return has(_features(sock), Feature.ACCESS_PLATFORM)
            except (OSError, ProtocolError) as error:
                raise spawned.gone(f"the back end does not say what it offers: {error}") from error


def _features(sock: socket.socket) -> int:
    """The virtio features that the back end offers. It sees one connection for this, and may end after it."""
    sock.settimeout(ANSWER_SECONDS)
    framer = Framer()
    sock.sendall(Message(Request.GET_FEATURES).encode())
    while data := sock.recv(framer.wanted):
        for message in framer.feed(data):
            if message.request == Request.GET_FEATURES and message.reply:
                return wire.u64_of(message.payload)
            raise ProtocolError(f"it answered with message {message.request}")
    raise ProtocolError("it closed the connection")
