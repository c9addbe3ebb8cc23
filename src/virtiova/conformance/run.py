# SPDX-License-Identifier: Apache-2.0
"""Asking: each case on a connection of its own, and again of a fresh process if the answer is not a plain one."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from virtiova.addr import UVA, Access
from virtiova.conformance.case import Case, CaseFailedError, CaseUnclearError
from virtiova.conformance.stand import Stand
from virtiova.errors import MachineError, NotPossibleError, ProtocolError
from virtiova.machine.backend import BackEnd
from virtiova.machine.vhost_user.connection import BUSY_SECONDS, Running
from virtiova.machine.vhost_user.frontend import FrontEnd
from virtiova.machine.vhost_user.machine import VhostUserMachine
from virtiova.probe.rig import FeaturesRefusedError, NotApplicableError
from virtiova.result import CaseEvidence, CaseResult, Verdict

_ASKED: Final = 16
"""Questions of the back end that the evidence keeps."""
_WORDS: Final = 20
_PLAIN: Final = (Verdict.PASS, Verdict.NOT_APPLICABLE)


class Examiner:
    """Asks cases of one back end, one after the other. Use as a context manager.

    A back end that we start is kept over several cases, as long as it lives; whatever it does not pass it is asked
    once more as a fresh process, and that answer counts. It is given up once it has not come up `_TRIES` times in a
    row.
    """

    def __init__(self, backend: BackEnd) -> None:
        self.lock = threading.Lock()
        """One thing at a time is asked."""
        self._backend = backend
        self._trouble = Trouble()
        self._running: Running | None = None
        self._used = False
        self._single: bool | None = None
        self._confirmed = 0
        """How often in a row a fresh process had no answer either."""

    def ask(self, case: Case) -> CaseResult:
        """The result of one case. Never raises on account of the back end."""
        result = self._once(case)
        if self._doubtful(result):
            self._drop()
            again = self._once(case)
            self._confirmed = self._confirmed + 1 if _no_answer(result) and _no_answer(again) else 0
            result = again
        elif not _no_answer(result) and result.result is not Verdict.NOT_APPLICABLE:
            self._confirmed = 0
        self._used = True
        return result

    @property
    def down(self) -> bool:
        """The back end did not come up when it was last tried."""
        return self._trouble.times > 0

    def _doubtful(self, result: CaseResult) -> bool:
        """Whether what was asked before may have to do with it. Who never gets as far as the question is not asked
        everything twice."""
        if not self._backend.spawn or not self._used:
            return False
        if not _no_answer(result):
            return result.result in (Verdict.FAIL, Verdict.UNKNOWN)
        return self._confirmed < _TRIES

    def _once(self, case: Case) -> CaseResult:
        kind = self._backend.kind
        blank = CaseResult(
            "vhost-user", f"vhost-user-{kind}", "", case.id, case.title, Verdict.UNKNOWN, str(case.citation), _NOTHING
        )
        if case.kinds and kind not in case.kinds:
            why = f"only {' and '.join(case.kinds)} devices have what is asked about"
            return replace(blank, result=Verdict.NOT_APPLICABLE, evidence=CaseEvidence(why))
        if self._trouble.hopeless:
            return replace(blank, evidence=CaseEvidence(f"not asked: {self._trouble.hopeless}"))
        with contextlib.ExitStack() as stack:
            try:
                running = self._ready()
                machine = stack.enter_context(VhostUserMachine(self._backend, running=running))
                stand = Stand(running, self._backend, machine)
            except (MachineError, ProtocolError, NotPossibleError) as error:
                said = getattr(error, "stderr", "").splitlines()[-_ASKED:]
                self._trouble.met(str(error))
                return replace(blank, evidence=CaseEvidence(f"{_NOT_SO_FAR}{error}", words=said))
            self._trouble.over()
            return _asked(replace(blank, product=machine.product), case, stand)

    def _ready(self) -> Running:
        """The back end, running; a fresh one if the last one has gone."""
        if self._running is not None and not (self._running.alive and self._running.again):
            self._drop()
        if self._running is None:
            self._running = Running(self._backend)
            if self._single is None:
                self._single = self._ends_with_its_connection(self._running)
                if self._single:
                    self._drop()
                    self._running = Running(self._backend)
            self._running.single = self._single
        return self._running

    def _ends_with_its_connection(self, running: Running) -> bool:
        """Whether the process ends, in order, when a front end goes that did no more than to ask for the features."""
        process = running.process
        if process is None or not running.again:
            return False
        _greet(running)
        try:
            # Some take long to end, and are still connected to in the meantime.
            _greet(running)
        except MachineError:
            code = process.exit_code(BUSY_SECONDS)
            return code is not None and code >= 0
        return False

    def _drop(self) -> None:
        running, self._running = self._running, None
        self._used = False
        if running is not None:
            running.close()

    def close(self) -> None:
        """End what was started."""
        self._drop()

    def __enter__(self) -> Examiner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _greet(running: Running) -> None:
    """Connect, ask for the features and hang up. `MachineError` if nobody answers."""
    with (
        running.connect() as sock,
        contextlib.closing(FrontEnd(sock, _nowhere, _nobody, UVA, running.gone)) as front,
    ):
        front.barrier()


def _no_answer(result: CaseResult) -> bool:
    """Whether it did not get as far as the question."""
    return result.result is Verdict.UNKNOWN and not result.evidence.readings


def _nowhere(_iova: int, _access: Access) -> None:
    return None


def _nobody(_iova: int, _access: Access) -> None:
    return None


_NOTHING: Final = CaseEvidence("")
_NOT_SO_FAR: Final = "it did not get as far as the question: "
_TRIES: Final = 2


class Trouble:
    """How often in a row a back end has not come up."""

    def __init__(self) -> None:
        self.times = 0
        self.hopeless = ""
        """Why it need not be tried any more."""

    def met(self, why: str) -> None:
        """It did not come up, once more."""
        self.times += 1
        if self.times >= _TRIES:
            self.hopeless = why

    def over(self) -> None:
        """It came up."""
        self.times = 0


def _asked(blank: CaseResult, case: Case, stand: Stand) -> CaseResult:
    """Ask one case of a stand that is up."""
    readings: Sequence[str] = ()
    try:
        verdict, seen = Verdict.PASS, case.ask(stand)
    except NotApplicableError as error:
        verdict, seen = Verdict.NOT_APPLICABLE, str(error)
    except FeaturesRefusedError:
        verdict, seen = Verdict.UNKNOWN, f"{_NOT_SO_FAR}the features were refused"
    except CaseFailedError as error:
        verdict, seen = Verdict.FAIL, str(error)
    except CaseUnclearError as error:
        verdict, seen, readings = Verdict.UNKNOWN, str(error), error.readings
    except (MachineError, ProtocolError) as error:
        crashed = stand.crashed()
        if stand.asking or crashed:
            verdict, seen = Verdict.FAIL, crashed or str(error)
        else:
            verdict, seen = Verdict.UNKNOWN, f"{_NOT_SO_FAR}{error}"
    except Exception as error:
        verdict, seen = Verdict.UNKNOWN, f"the case {case.id} itself is wrong: {type(error).__name__}: {error}"
    plain = verdict in _PLAIN
    evidence = CaseEvidence(
        seen,
        list(readings),
        [witness for witness in stand.witnesses if witness.touched or not plain],
        [f"{each.kind.name} 0x{each.iova:x} {each.perm.name}" for each in list(stand.spoken.asked)[-_ASKED:]],
        stand.words()[-_WORDS:],
    )
    return replace(blank, result=verdict, evidence=evidence)


def guessed(backend: BackEnd) -> BackEnd:
    """The back end with its device type, which takes a connection if it is not given."""
    backend.check()
    if backend.kind:
        return backend
    with VhostUserMachine(backend) as machine:
        return replace(backend, kind=machine.kind, guess=machine.guess)


def run_cases(backend: BackEnd, cases: Sequence[Case], *, jobs: int | None = None) -> Iterator[CaseResult]:
    """Ask all ``cases``; results in their order, each as soon as it and those before it are there.

    ``jobs`` back ends are started, two if nothing is said; somebody's that listens is asked one thing at a time.
    """
    jobs = min(jobs or min(2, os.cpu_count() or 1), max(1, len(cases))) if backend.spawn else 1
    mine = threading.local()
    examiners: list[Examiner] = []

    def begin() -> None:
        mine.examiner = Examiner(backend)
        examiners.append(mine.examiner)

    def ask(case: Case) -> CaseResult:
        own: Examiner = mine.examiner
        with own.lock:
            result = own.ask(case)
        # Two of it may need what there is one of, such as a port: then the first one gets all cases.
        for other in [each for each in examiners if own.down and each is not own]:
            with other.lock:
                found = result if other.down else other.ask(case)
            if not other.down:
                return found
        return result

    with contextlib.ExitStack() as stack:
        stack.callback(_close_all, examiners)
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(jobs, initializer=begin))
        futures = [pool.submit(ask, case) for case in cases]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


def _close_all(examiners: Sequence[Examiner]) -> None:
    with contextlib.ExitStack() as stack:
        for examiner in examiners:
            stack.callback(examiner.close)
