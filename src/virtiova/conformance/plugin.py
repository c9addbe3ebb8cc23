# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: the conformance cases as tests of somebody's own suite.

    pytest --virtiova-backend 'my-backend --socket-path {socket}' --virtiova-type blk

adds one test a case, ``virtiova::CASE``, to whatever else is collected. A case that fails, or could not be asked, is a
failed test; one that two readings allow, or that does not apply, is skipped with the reason. Without the option it does
nothing, and costs nothing: it is imported in every pytest run of an environment that has virtiova.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from virtiova.conformance.run import Examiner
    from virtiova.result import CaseResult

_GROUP: Final = "virtiova: conformance of a vhost-user back end"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, as those of ``virtiova probe vhost-user``."""
    group = parser.getgroup("virtiova", _GROUP)
    group.addoption(
        "--virtiova-backend",
        metavar="COMMAND",
        help="start this back end; {socket} is where it is to listen, {image} a disk image of ours, {net} the number "
        "of a datagram socket",
    )
    group.addoption("--virtiova-socket", metavar="SOCKET", help="or ask the one that listens there")
    group.addoption("--virtiova-type", metavar="KIND", help="blk, console, fs, net or rng (default: guessed)")
    group.addoption("--virtiova-write", action="store_true", help="allow writes to its disk")
    group.addoption("--virtiova-echo", action="store_true", help="its network sends back each frame")
    group.addoption(
        "--virtiova-case", action="append", metavar="ID", help="this case only (may be repeated; default: all)"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Take part only if a back end is named."""
    command, socket = config.getoption("--virtiova-backend"), config.getoption("--virtiova-socket")
    if command or socket:
        if socket and config.getoption("numprocesses", None):
            raise pytest.UsageError("--virtiova-socket: who listens is asked one thing at a time; not with -n")
        config.pluginmanager.register(_Cases(config, command or "", socket or ""), "virtiova-cases")
    elif config.getoption("--virtiova-case") or config.getoption("--virtiova-type"):
        raise pytest.UsageError("--virtiova-backend or --virtiova-socket says which back end is asked")


class _Cases:
    """The back end under test, and the tests made of the cases."""

    def __init__(self, config: pytest.Config, command: str, socket: str) -> None:
        from virtiova.conformance.run import guessed
        from virtiova.errors import VirtiovaError
        from virtiova.machine.backend import BackEnd

        write, echo = config.getoption("--virtiova-write"), config.getoption("--virtiova-echo")
        kind = config.getoption("--virtiova-type") or ""
        try:
            self.backend = guessed(BackEnd(socket, command, kind, write=write, echo=echo))
        except VirtiovaError as error:
            raise pytest.UsageError(f"virtiova: {error}") from None
        self._only = config.getoption("--virtiova-case")
        self._examiner: Examiner | None = None

    @property
    def examiner(self) -> Examiner:
        """Whoever asks, in this process."""
        from virtiova.conformance.run import Examiner

        if self._examiner is None:
            self._examiner = Examiner(self.backend)
        return self._examiner

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        """Add the cases; whoever selects by name does so afterwards."""
        items += _Folder.from_parent(session, name="virtiova", nodeid="virtiova", cases=self).collect()

    def pytest_sessionfinish(self) -> None:
        """End the back end."""
        examiner, self._examiner = self._examiner, None
        if examiner is not None:
            examiner.close()

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Whether the device type was a guess."""
        if self.backend.guess:
            said = f"that the device is of type {self.backend.kind} is a guess: {self.backend.guess}"
            terminalreporter.write_line(f"virtiova: {said}; --virtiova-type says it")

    def names(self) -> Iterator[str]:
        """The ids of the cases."""
        from virtiova.conformance.case import find
        from virtiova.conformance.cases import CASES
        from virtiova.errors import UsageError

        for name in self._only or CASES:
            try:
                yield find(name).id
            except UsageError as error:
                raise pytest.UsageError(f"--virtiova-case: {error}") from None


class _Folder(pytest.Collector):
    """Where the cases are in the tree of tests."""

    def __init__(self, *, cases: _Cases, **named: Any) -> None:
        super().__init__(**named)
        self._cases = cases

    def collect(self) -> list[pytest.Item]:
        """A test a case."""
        return [
            _Test.from_parent(self, name=name, nodeid=f"virtiova::{name}", cases=self._cases)
            for name in self._cases.names()
        ]


class _CaseError(Exception):
    """A case failed."""

    def __init__(self, result: CaseResult) -> None:
        super().__init__(result.evidence.seen)
        self.result = result


class _Test(pytest.Item):
    """One case."""

    def __init__(self, *, cases: _Cases, **named: Any) -> None:
        super().__init__(**named)
        self._cases = cases

    def runtest(self) -> None:
        """Ask it."""
        from virtiova.conformance.case import find
        from virtiova.result import Verdict

        result = self._cases.examiner.ask(find(self.name))
        if result.result is Verdict.FAIL or result.unanswered:
            raise _CaseError(result)
        if result.result is not Verdict.PASS:
            pytest.skip("; or: ".join([f"{result.result}: {result.evidence.seen}", *result.evidence.readings]))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """What was seen, and where to read on; not our own stack."""
        error = excinfo.value
        if not isinstance(error, _CaseError):
            return super().repr_failure(excinfo, style)
        from virtiova.conformance.case import find

        result, case = error.result, find(self.name)
        rows = [
            f"{case.id}: {case.title}",
            f"seen      {result.evidence.seen}",
            f"rests on  {result.citation}",
            f"why       {case.why}",
            f"fix       {case.fix}",
            *(f"asked     {asked}" for asked in result.evidence.asked),
            *(f"said      {word}" for word in result.evidence.words),
        ]
        return "\n".join(rows)

    def reportinfo(self) -> tuple[str, None, str]:
        """Where it is, for headings."""
        return "virtiova", None, f"virtiova::{self.name}"
