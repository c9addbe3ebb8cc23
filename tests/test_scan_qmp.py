# SPDX-License-Identifier: Apache-2.0
"""What QEMU's monitor says, as facts: of real QEMUs that do not run yet, and of monitors that answer anything."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path as FilePath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from newer_qemu import newer_qemu
from virtiova.collect import asked, monitor, qmp
from virtiova.collect import keys as k
from virtiova.collect.facts import Certainty, Device, View
from virtiova.collect.qemu import collect as command_line
from virtiova.errors import ProtocolError
from virtiova.machine.qemu.boards import VIRT
from virtiova.machine.qemu.process import QemuProcess
from virtiova.result import Path
from virtiova.result.scan import Place
from virtiova.scan import scan_views
from virtiova.scan.join import join

UUID = "12345678-1234-1234-1234-123456789abc"
Transcript = dict[str, Any]

Q35 = [
    *("-M", "q35,kernel-irqchip=split", "-name", "vm1", "-uuid", UUID.upper()),
    *("-device", "intel-iommu,intremap=on,device-iotlb=on,caching-mode=on"),
    *("-object", "rng-builtin,id=r", "-device", "pcie-root-port,id=rp0,bus=pcie.0,addr=1,chassis=1"),
    *("-device", "pxb-pcie,id=px,bus=pcie.0,addr=2,bus_nr=0x40,bypass_iommu=on"),
    *("-device", "pxb-pcie,bus=pcie.0,addr=3,bus_nr=0x80"),
    *("-device", "pcie-root-port,id=rp1,bus=px,chassis=2"),
    *("-device", "virtio-rng-pci,bus=rp0,rng=r,iommu_platform=on,ats=on,id=deep"),
    *("-device", "virtio-rng-pci,id=around,bus=rp1,rng=r"),
    *("-device", "virtio-balloon-pci,bus=pcie.0,addr=9.2"),
    *("-netdev", "user,id=n", "-device", "virtio-net-pci,id=net,bus=pcie.0,addr=0xa,netdev=n"),
]
VIRT_SMMU = [
    *("-M", "virt,iommu=smmuv3", "-cpu", "cortex-a57", "-global", "virtio-mmio.force-legacy=false"),
    *("-object", "rng-builtin,id=r", "-device", "pcie-root-port,id=rp0,bus=pcie.0,addr=3,chassis=1"),
    *("-device", "virtio-rng-pci,bus=rp0,rng=r,iommu_platform=on,id=deep"),
    *("-device", "virtio-rng-device,rng=r,iommu_platform=on,id=mmio"),
]


@contextlib.contextmanager
def qemu(folder: FilePath, arguments: Sequence[str], binary: str, **more: Any) -> Iterator[str]:
    """A real QEMU that waits before its first instruction; its monitor's socket."""
    path = str(folder / "qmp")
    argv = [binary, "-nodefaults", "-no-user-config", "-display", "none", "-S", "-accel", "tcg", "-m", "64"]
    process = QemuProcess([*argv, *arguments, "-qmp", f"unix:{path},server=on,wait=off"], [], **more)
    try:
        end = time.monotonic() + 20
        while not listens(path):
            assert process.exit_code(0.02) is None, process.stderr()
            assert time.monotonic() < end
        yield path
    finally:
        process.close()


def listens(path: str) -> bool:
    """Is somebody there? Whoever greeted us is free again when we have gone."""
    with socket.socket(socket.AF_UNIX) as end, contextlib.suppress(OSError):
        end.settimeout(5)
        end.connect(path)
        return bool(end.recv(1))
    return False


@pytest.fixture(scope="module")
def q35(tmp_path_factory: pytest.TempPathFactory) -> Transcript:
    with qemu(tmp_path_factory.mktemp("q35"), Q35, "qemu-system-x86_64") as path:
        return qmp.transcript(path)


def device(view: View, name: str) -> Device:
    (found,) = [each for each in view.devices if each.name == name]
    return found


def values(found: Device, *keys: Any) -> list[Any]:
    return [found.facts.get(key) for key in keys]


# -- real ones -------------------------------------------------------------------------------------------------------


def test_a_machine_that_is_about_to_start(q35: Transcript) -> None:
    view = qmp.view(q35, "vm.qmp")
    get = view.machine.get
    assert (get(k.NAME), get(k.UUID), get(k.VMM), get(k.MACHINE_TYPE)) == ("vm1", UUID, "qemu", "pc-q35-7.2")
    assert (get(k.ARCH), get(k.IOMMU), get(k.RUN_STATE)) == ("x86_64", "intel", "prelaunch")
    assert (get(k.VMM_VERSION) or "").startswith("7.2.")
    assert {"caching-mode=on", "device-iotlb=on", "intremap=on", "pt=on"} <= set(get(k.IOMMU_OPTIONS) or ())
    assert get(k.ROOT_BUSES) == ("pcie.0", "px (around the IOMMU)")
    assert get(k.RAM) == (0, 0xBFFFF, 0x100000, 0x3FFFFFF)
    assert not view.problems
    assert not view.empty
    deep, around = device(view, "deep"), device(view, "around")
    keys = (k.TYPE, k.MODEL, k.TRANSPORT, k.PLACE, k.BRIDGED, k.BEHIND_IOMMU, k.OFFERED, k.ACCEPTED, k.CONFIGURED)
    assert values(deep, *keys) == ["rng", "virtio-rng-pci", "pci", "pci:00:01.0/00.0", True, True, True, None, True]
    assert values(around, *keys) == [
        "rng",
        "virtio-rng-pci",
        "pci",
        "pci:40:00.0/00.0",
        True,
        False,
        False,
        None,
        False,
    ]
    assert values(deep, k.ATS, k.DISABLE_LEGACY, k.CAN_BE_LEGACY, k.STARTED) == [True, "on", False, False]
    balloon = device(view, "device[2]")
    found = values(balloon, k.TYPE, k.PLACE, k.ADDRESS, k.DISABLE_LEGACY, k.CAN_BE_LEGACY, k.STATUS)
    assert found == ["balloon", "pci:00:09.2", "0000:00:09.2", "off", True, 0]
    assert device(view, "net").facts.get(k.TYPE) == "net"


def test_a_guest_that_has_not_started_is_taken_to_program_its_iommu(q35: Transcript) -> None:
    """VT-d is off until a guest turns it on: that is no statement about the guest."""
    rows = {each.name: each for each in scan_views([qmp.view(q35, "vm.qmp")]).devices}
    assert (rows["deep"].verdict, rows["deep"].observed) == (Path.TRANSLATED, None)
    assert "the guest programs the IOMMU" in rows["deep"].assumes
    assert rows["around"].verdict is Path.DIRECT
    assert rows["net"].verdict is Path.BYPASS


@pytest.mark.parametrize("newer", [False, pytest.param(True, id="qemu-10")])
def test_both_forms_of_the_answers(newer: bool, tmp_path: FilePath, pytestconfig: pytest.Config) -> None:
    arguments, binary, more = VIRT_SMMU, "qemu-system-aarch64", dict[str, Any]()
    if newer:
        installation = newer_qemu(pytestconfig)
        binary, arguments = installation.binary(VIRT), [*installation.arguments, *VIRT_SMMU]
        more = {"environment": installation.environment}
    with qemu(tmp_path, arguments, binary, **more) as path:
        view = qmp.collect(path)
    assert (view.machine.get(k.VMM_VERSION) or "").startswith("10." if newer else "7.2.")
    assert (view.machine.get(k.IOMMU), view.machine.get(k.ARCH), view.machine.get(k.UUID)) == (
        "smmuv3",
        "aarch64",
        None,
    )
    keys = (k.TYPE, k.TRANSPORT, k.PLACE, k.BEHIND_IOMMU, k.OFFERED, k.CONFIGURED, k.STARTED)
    assert values(device(view, "deep"), *keys) == ["rng", "pci", "pci:00:03.0/00.0", True, True, True, False]
    mmio = device(view, "mmio")
    assert values(mmio, *keys) == ["rng", "mmio", "mmio:0xa003e00", False, True, True, False]
    assert mmio.facts.get(k.ADDRESS) == "a003e00.virtio_mmio"
    rows = {each.name: each for each in scan_views([view]).devices}
    assert (rows["deep"].verdict, rows["mmio"].verdict) == (Path.TRANSLATED, Path.DIRECT)


def test_a_monitor_serves_one_at_a_time(tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is let in without a word: QEMU's listener takes the connection and QEMU does not."""
    monkeypatch.setattr(qmp, "_SECONDS", 0.4)
    with qemu(tmp_path, ["-M", "none"], "qemu-system-x86_64") as path, socket.socket(socket.AF_UNIX) as first:
        first.connect(path)
        assert first.recv(100)
        view = qmp.collect(path)
    assert view.empty
    assert "somebody else holds this monitor" in view.problems[0]
    assert view.problems[0].startswith(path)


def test_what_is_asked_changes_nothing(q35: Transcript) -> None:
    lines = {each["arguments"].get("command-line") for each in q35["asked"]} - {None}
    assert lines == {"info mtree -f", "info network"}
    commands = {each["command"] for each in q35["asked"]} - {"human-monitor-command"}
    assert all(each.startswith(("query-", "x-query-virtio", "qom-get", "qom-list")) for each in commands)
    assert json.loads(json.dumps(q35)) == q35, "a document"


@pytest.mark.parametrize(
    ("command", "line"), [("stop", ""), ("human-monitor-command", "stop"), ("human-monitor-command", "info x\nstop")]
)
def test_what_would_change_something_is_not_asked(command: str, line: str) -> None:
    live = asked.Live(None)  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        live.ask(command, **({"command-line": line} if line else {}))


def test_a_machine_and_its_command_line_agree(q35: Transcript) -> None:
    """Two ways to look at one machine: each device at the same place, with the same path; together, one machine."""
    words = ["qemu-system-x86_64", "-nodefaults", *Q35]
    written, running = command_line(words, Place("command line", "vm.sh")), qmp.view(q35, "vm.qmp")
    said = {
        source: {each.address: (each.type, each.offered, each.verdict) for each in scan_views([view]).devices}
        for source, view in (("written", written), ("running", running))
    }
    assert said["written"] == said["running"]
    assert len(said["running"]) == 4
    assert all(name.isprintable() for name in written.machine.get(k.ROOT_BUSES) or ())
    (joined,) = join([written, running])
    assert len(joined.devices) == 4
    assert "VA901" not in {each.id for each in scan_views([written, running]).findings}


# -- transcripts -----------------------------------------------------------------------------------------------------


def without(transcript: Transcript, *commands: str, kind: str = "CommandNotFound") -> Transcript:
    """The same, of a QEMU that does not have these commands."""
    found = copy.deepcopy(transcript)
    found["asked"] = [each for each in found["asked"] if not each["command"].startswith(commands)]
    said = {"class": kind, "desc": "The command has not been found"}
    found["asked"] += [{"command": each, "arguments": {}, "error": said} for each in commands]
    return found


def test_a_qemu_before_it_told_of_virtio(q35: Transcript) -> None:
    """What can be had by the tree of objects is had all the same."""
    view = qmp.view(without(q35, "x-query-virtio"), "old.qmp")
    assert len(view.problems) == 1
    assert "since 7.2" in view.problems[0]
    deep = device(view, "deep")
    assert values(deep, k.TYPE, k.PLACE, k.CONFIGURED, k.ACCEPTED) == ["rng", "pci:00:01.0/00.0", True, None]
    offer = deep.facts.fact(k.OFFERED)
    assert offer is not None
    assert (offer.value, offer.certainty) == (True, Certainty.INFERRED)
    assert {each.name for each in view.devices} == {"deep", "around", "device[2]", "net"}


def test_a_transcript_that_ends_in_the_middle(q35: Transcript) -> None:
    for length in range(0, len(q35["asked"]), 7):
        cut = {**q35, "asked": q35["asked"][:length], "problems": ["QEMU's monitor: it hung up"]}
        view = qmp.view(cut, "cut")
        assert view.problems[0] == "cut: QEMU's monitor: it hung up"
        assert view.empty is (length == 0)
        scan_views([view])


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "type", "path", "bus", "devices", "slot", "pci_bridge", "transports", "statuses"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@given(st.data())
def test_any_answer_comes_to_a_view(q35: Transcript, data: st.DataObject) -> None:
    """One answer, or some, of another form: nothing is raised, and the rest is there."""
    found = {**q35, "asked": list(q35["asked"])}
    for place in data.draw(st.lists(st.integers(0, len(q35["asked"]) - 1), min_size=1, max_size=4)):
        entry = {key: value for key, value in found["asked"][place].items() if key != "error"}
        found["asked"][place] = entry | {"answer": data.draw(ANY)}
    view = qmp.view(found, "any")
    for fact in [*view.machine, *(fact for each in view.devices for fact in each.facts)]:
        assert str(fact.value).isprintable()
    scan_views([view])


@pytest.mark.parametrize("bad", [None, [], {}, {"schema": "other"}, 7, {"schema": None}])
def test_what_is_no_transcript(bad: object) -> None:
    with pytest.raises(ProtocolError, match="no transcript"):
        qmp.view(bad, "x")


@pytest.mark.parametrize(
    "asked_for", [None, {}, 7, [None, 7, {}, {"command": []}, {"command": "x", "arguments": {"a": []}}]]
)
def test_a_transcript_of_nothing(asked_for: object) -> None:
    view = qmp.view({"schema": asked.SCHEMA, "asked": asked_for, "problems": [7, None, "\x1b[2Jnone"]}, "x")
    assert view.empty
    assert view.problems == ["x: none"]


@pytest.mark.parametrize("data", [b"", b"[" * 100_000, b"{}", b"\xff", b'{"schema": NaN}'])
def test_a_file_that_is_no_transcript(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        qmp.read(data, "x")


def test_a_file_is_read(q35: Transcript) -> None:
    view = qmp.read(json.dumps(q35).encode(), "vm.json")
    assert view.machine.get(k.NAME) == "vm1"


# -- sockets that are no monitor's -----------------------------------------------------------------------------------

GREETING = b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 8}, "package": ""}, "capabilities": []}}\n'


def talk(say: Callable[[socket.socket], object], folder: FilePath) -> View:
    """What comes of a listener that says what it wants."""
    path = str(folder / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)

        def serve() -> None:
            with contextlib.suppress(OSError), listener.accept()[0] as end:
                end.settimeout(5)
                say(end)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        view = qmp.collect(path)
        thread.join(10)
        assert not thread.is_alive()
    assert view.problems
    assert all(each.isprintable() and len(each) < 600 for each in view.problems), view.problems
    return view


def greeted(*answers: bytes) -> Callable[[socket.socket], None]:
    """Greet, and answer one after the other."""

    def say(end: socket.socket) -> None:
        end.sendall(GREETING)
        for answer in answers:
            name = json.loads(end.recv(65536).split(b"\n")[0]).get("id", "")
            end.sendall(answer.replace(b"@", name.encode()))

    return say


OK = b'{"return": {}}\n'


@pytest.mark.parametrize(
    ("say", "words"),
    [
        (lambda end: None, "hung up without a greeting"),
        (lambda end: end.sendall(b"HTTP/1.1 400\r\n"), "does not speak QMP"),
        (lambda end: end.sendall(b"QEMU 7.2.22 monitor - type 'help'\r\n(qemu) "), "for people"),
        (lambda end: end.sendall(b"{" * 200_000 + b"\n"), "monitor"),
        (lambda end: end.sendall(b'{"QMP": ' + b"[" * 200_000 + b"\n"), "monitor"),
        (lambda end: end.sendall(b'{"QMP": NaN}\n'), "monitor"),
        (lambda end: end.sendall(b'{"QMP": 7}\n'), "monitor"),
        (lambda end: end.sendall(b'{"x": 7}\n'), "monitor"),
        (greeted(b"{}\n"), "monitor"),
        (greeted(OK), "monitor"),
        (greeted(OK, b'{"return": NaN, "id": "@"}\n', b"\xff\xfe\n"), "monitor"),
        (greeted(OK, b'{"return": ' + b"[" * 200_000 + b"\n"), "monitor"),
        (greeted(OK, b'{"error": 7, "id": "@"}\n'), "monitor"),
        (greeted(OK, b'{"error": {"class": [], "desc": {}}, "id": "@"}\n'), "monitor"),
    ],
)
def test_a_socket_that_is_no_monitor(
    say: Callable[[socket.socket], object], words: str, tmp_path: FilePath, caplog: pytest.LogCaptureFixture
) -> None:
    view = talk(say, tmp_path)
    assert words in view.problems[0]
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


def test_a_monitor_that_says_no_more(tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "_SECONDS", 0.3)

    def say(end: socket.socket) -> None:
        greeted(OK)(end)
        end.recv(65536)
        end.recv(1)

    assert "did not answer" in talk(say, tmp_path).problems[0]


def test_a_line_without_end(tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "_ANSWER", 1 << 20)

    def say(end: socket.socket) -> None:
        greeted(OK)(end)
        end.recv(65536)
        for _ in range(100):
            end.sendall(b"x" * (1 << 20))

    assert talk(say, tmp_path).problems


def test_places_without_a_listener(tmp_path: FilePath) -> None:
    path, plain = tmp_path / "gone", tmp_path / "plain"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    plain.write_text("x")
    for name, words in ((path, "nobody listens"), (plain, "is no socket"), (tmp_path / "none", "No such file")):
        view = qmp.collect(str(name))
        assert view.empty
        assert words in view.problems[0]
    assert "too long" in qmp.collect(str(tmp_path / ("x" * 120))).problems[0]
