# SPDX-License-Identifier: Apache-2.0
"""Playing a sequence against a back end, and looking what became of it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Self

from virtiova.addr import UVA
from virtiova.errors import MachineError, ProtocolError, VirtiovaError
from virtiova.fuzz.findings import CRASH, HANG, LOST, STRAY, Finding, Step
from virtiova.fuzz.generate import SETUP
from virtiova.fuzz.steps import STEPS
from virtiova.fuzz.world import Unfit, World
from virtiova.machine.backend import BackEnd
from virtiova.machine.vhost_user.connection import Running
from virtiova.machine.vhost_user.frontend import REPLY_SECONDS, FrontEnd
from virtiova.wire.vhost_user import Request

ANSWER_SECONDS: Final = REPLY_SECONDS
"""How long a new front end waits for GET_FEATURES. A back end may have to finish what it was at."""
_END_SECONDS: Final = 0.3
_AFTER_SECONDS: Final = 0.002
_GROANS: Final = re.compile(
    r"(Address|Memory|Thread|UndefinedBehavior|Leak)Sanitizer|runtime error:|panicked at|stack smashing|double free|"
    r"Assertion .* failed|virtiova: internal error"
)
"""What programs print when they come to grief, whatever status they then end with."""


class _Curt(Running):
    """One whose last words are heard when something was found, not whenever it hangs up over nonsense."""

    def gone(self, message: str) -> MachineError:
        """An error with nothing but the message."""
        return MachineError(message)


class Player:
    """Plays sequences against one back end, kept as long as it lives. Use as a context manager.

    ``patience`` are the seconds that valid requests, and a new front end, wait. Raises `MachineError` if the back end
    does not come up at all.
    """

    def __init__(self, backend: BackEnd, patience: float = ANSWER_SECONDS) -> None:
        self._backend = backend
        self._patience = patience
        self._running: Running | None = None
        self._fresh = False
        self._stays: bool | None = None
        """Whether the process outlives a front end that goes. Known after the first one has gone."""
        self.steps = 0
        """Steps that were done so far."""
        self.unfit = 0
        """Sequences whose set-up this back end does not have."""

    def play(self, steps: Sequence[Step]) -> Finding | None:
        """One sequence, on a connection of its own; what it brought out."""
        running = self._ready()
        found = self._on(running, steps)
        if found is None:
            found = self._aftermath(running)
        if found is not None:
            words = running.words()
            self.drop()
            return replace(found, steps=list(steps), words=words[-8:])
        return None

    def _ready(self) -> Running:
        running = self._running
        if running is not None and not (running.alive and running.again and self._stays is not False):
            self.drop()
        if self._running is None:
            self._running = _Curt(self._backend)
            self._fresh = True
            if self._stays is None and self._running.again:
                self._stays = self._outlives(self._running)
                if not self._stays:
                    self.drop()
                    self._running = _Curt(self._backend)
        return self._running

    def _outlives(self, running: Running) -> bool:
        """Whether it is there for the next front end when one has gone."""
        try:
            self._hello(running, ANSWER_SECONDS)
            self._hello(running, ANSWER_SECONDS)
        except (MachineError, ProtocolError):
            if running.alive:
                raise
            return False
        return True

    @staticmethod
    def _hello(running: Running, seconds: float) -> None:
        with running.connect() as sock:
            front = FrontEnd(sock, lambda *_: None, lambda *_: None, _nowhere, running.gone)
            try:
                front.wait(front.post(Request.GET_FEATURES, need_reply=False), seconds)
            finally:
                front.close()

    # -- one connection ------------------------------------------------------------------------------------------

    def _on(self, running: Running, steps: Sequence[Step]) -> Finding | None:
        (name, *numbers), *rest = steps
        bit33, packed, size, left, slots = (int(each) for each in numbers)
        assert name == SETUP
        valid = True
        stray = ""
        world: World | None = None
        try:
            with World(
                self._backend, running, bit33=bool(bit33), packed=bool(packed), size=size, left=left, slots=bool(slots)
            ) as world:
                world.front.reply_seconds = self._patience
                try:
                    for each in rest:
                        self._do(world, each)
                    valid = world.valid
                    if valid:
                        world.settle(self._patience)
                    else:
                        self._calm(world)
                finally:
                    stray = world.ledger.strayed()
                if stray:
                    return Finding(STRAY, stray)
                return _lost(world) if valid else None
        except Unfit:
            self.unfit += 1
            return None
        except (MachineError, ProtocolError) as error:
            if stray:
                return Finding(STRAY, stray)
            if world is None or not world.valid:
                # It may close the connection over what makes no sense, and over a set-up that it has not.
                return None
            if (crash := self._crashed(running, _END_SECONDS)) is not None:
                return crash
            kind = HANG if "did not answer" in str(error) else LOST
            return Finding(kind, f"in a sequence that makes sense: {error}")

    def _do(self, world: World, step: Step) -> None:
        name, *numbers = step
        kind = STEPS[str(name)]
        if not kind.good:
            world.spoil()
        kind.do(world, *numbers)
        self.steps += 1
        # What the back end asks meanwhile is answered, if it is not to wait.
        world.front.pump(0)

    @staticmethod
    def _calm(world: World) -> None:
        """After nonsense: time to do the worst of it."""
        world.release()
        world.machine.wait(lambda: False, _AFTER_SECONDS)
        with contextlib.suppress(MachineError, ProtocolError):
            world.front.barrier()

    # -- afterwards ----------------------------------------------------------------------------------------------

    def _aftermath(self, running: Running) -> Finding | None:
        if not (running.again and self._stays):
            # It ends with its front end: how is seen when it has.
            return self._crashed(running, _END_SECONDS)
        try:
            self._hello(running, self._patience)
        except (MachineError, ProtocolError) as error:
            return self._crashed(running, _END_SECONDS) or Finding(
                HANG, f"no other front end is served after it: {error}"
            )
        return self._crashed(running, 0.0)

    def _crashed(self, running: Running, seconds: float) -> Finding | None:
        process = running.process
        code = None if process is None else process.exit_code(seconds)
        if code is None:
            return None
        groan = next((line for line in running.words() if _GROANS.search(line)), "")
        if code < 0 or groan or (self._stays and running.again):
            how = f"signal {-code}" if code < 0 else f"exit status {code}"
            return Finding(CRASH, f"its process ended by {how}" + (f": {groan}" if groan else ""))
        return None

    def drop(self) -> None:
        """End the process; the next sequence gets a fresh one."""
        running, self._running = self._running, None
        if running is not None:
            running.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()


def _lost(world: World) -> Finding | None:
    if world.problem:
        return Finding(LOST, f"what was used is no request that there was: {world.problem}")
    if world.left:
        return Finding(LOST, f"{world.left} of {world.made} valid requests were never used")
    return None


def _nowhere(_: int) -> UVA:
    raise VirtiovaError("there is no memory on this connection")
