# SPDX-License-Identifier: Apache-2.0
"""The matrix: what is planned, what comes of it, and what the command makes of trouble."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path as FilePath
from types import SimpleNamespace

import pytest

from probe_kit import ON
from virtiova.cli import exits, main
from virtiova.cli.matrix import pieces
from virtiova.errors import NotPossibleError, UsageError
from virtiova.machine.qemu import boards
from virtiova.machine.qemu.boards import BOARDS, Q35
from virtiova.machine.qemu.installation import Installation, device_types
from virtiova.matrix import SYSTEMS, Extent, Planned, Selection, answer, guests, plan, run_planned
from virtiova.matrix.negotiate import NEGOTIATE, WITHOUT
from virtiova.matrix.systems import PLATFORMS, platforms
from virtiova.matrix.work import run_with
from virtiova.policy import RULES
from virtiova.probe.plan import Runner, Task
from virtiova.report.matrix import text
from virtiova.result import Cell, Path, Row
from virtiova.run.executor import Done
from virtiova.run.results import Results, fingerprint

# -- the plan ----------------------------------------------------------------------------------------------------


def test_every_system_has_its_rows() -> None:
    """Never silently skipped: what cannot be had is there with the reason."""
    tasks = plan().tasks
    assert {planned.system for planned in tasks} == {system.id for system in SYSTEMS}
    assert all(planned.missing for planned in tasks if planned.task.device == "virtio-*")
    there = {(planned.task.machine, planned.task.iommu) for planned in tasks}
    assert {(row.machine, row.iommu) for row in PLATFORMS} <= there


@pytest.mark.qemu
def test_both_states_of_the_bit_everywhere() -> None:
    states: dict[tuple[str, str, str], set[bool]] = {}
    for planned in plan().tasks:
        # A device without the bit goes around the IOMMU, and says nothing of what that maps to. A back end is as it is.
        if planned.task.machine == "vhost-user":
            continue
        if not planned.missing and planned.task.experiment not in ("control", "map-target"):
            key = (planned.system, planned.task.machine, planned.task.iommu)
            states.setdefault(key, set()).update("iommu_platform=on" in device for device in planned.task.devices)
    assert states
    assert all(seen == {False, True} for seen in states.values())


def test_boards_and_iommus_are_taken_as_they_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new row among the boards needs no line here."""
    extra = replace(Q35, iommus=Q35.iommus | {"brandnew": boards.NONE})
    monkeypatch.setitem(BOARDS, "q35", extra)
    monkeypatch.setitem(BOARDS, "newboard", replace(Q35, name="newboard"))
    monkeypatch.setitem(BOARDS, "sun4u", replace(Q35, name="sun4u", iommus={"sabre": boards.NONE, "x": boards.NONE}))
    found = {(row.machine, row.iommu): row.system for row in platforms()}
    assert found["q35", "brandnew"] == "iommu"
    assert found["newboard", "none"] == "most"
    assert found["newboard", "intel"] == "iommu"
    assert found["sun4u", "x"] == found["sun4u", "sabre"] == "sparc"
    assert any(planned.task.iommu == "brandnew" and not planned.missing for planned in plan().tasks) is bool(
        shutil.which(Q35.binary)
    )


def test_a_board_whose_qemu_is_missing_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = replace(
        Q35, name="sun4u", binary="qemu-system-none", package="qemu-system-sparc", iommus={"sabre": boards.NONE}
    )
    monkeypatch.setitem(BOARDS, "sun4u", gone)
    (planned,) = plan(Selection(only=("sparc",))).tasks
    assert "apt-get install qemu-system-sparc" in planned.missing
    (row,) = run_planned(planned)
    assert (row.system, row.cell.observed, row.cell.mismatch) == ("sparc", Path.NOT_APPLICABLE, False)
    assert "qemu-system-sparc" in row.cell.evidence.note


def test_nothing_at_all_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    tasks = plan().tasks
    assert {planned.system for planned in tasks} == {system.id for system in SYSTEMS}
    # But our own back ends, over our own front end.
    assert {planned.product.partition("-")[0] for planned in tasks if not planned.missing} == {"virtiova"}
    assert all(planned.task.machine == "vhost-user" for planned in tasks if not planned.missing)


@pytest.mark.parametrize(
    ("only", "skip", "machines", "iommus"),
    [
        (("q35",), (), {"q35"}, None),
        (("intel",), (), {"q35"}, {"intel"}),
        (("q35", "virt", "none"), (), {"q35", "virt"}, {"none"}),
        (("sparc",), (), {"sun4u"}, {"sabre"}),
        (
            (),
            ("q35", "virt", "riscv-virt"),
            {
                *("vhost-user", "vfio", "vhost", "vdpa", "s390-zpci", "xen-pv", "sun4u", "pseries", "powernv9"),
                *("virt-mmio", "s390-ccw"),
            },
            None,
        ),
    ],
)
def test_only_and_skip(
    only: tuple[str, ...], skip: tuple[str, ...], machines: set[str], iommus: set[str] | None
) -> None:
    tasks = plan(Selection(only, skip)).tasks
    assert {planned.task.machine for planned in tasks} == machines
    assert iommus is None or {planned.task.iommu.split(",")[0] for planned in tasks} == iommus


def test_variants_of_a_platform_stand_beside_it_with_both_bits_and_say_what_they_were_told() -> None:
    """A bus that is led around the IOMMU, and ATS: what they were told is what tells them apart."""
    tasks = [planned.task for planned in plan(Selection(only=("most", "iommu"))).tasks if not planned.missing]
    told = {
        (task.machine, task.iommu, "ats=on" in task.device, ON in task.device)
        for task in tasks
        if "," in task.iommu or "ats=on" in task.device
    }
    around = [("q35", "intel"), ("q35", "amd"), ("q35", "virtio"), ("virt", "smmuv3"), ("virt", "virtio")]
    wanted = {(machine, f"{iommu},bypass-bus=on", False) for machine, iommu in around}
    wanted.add(("q35", "intel,device-iotlb=on", True))
    assert told == {(*row, bit) for row in wanted if shutil.which(BOARDS[row[0]].binary) for bit in (False, True)}
    planned = next(p for p in plan(Selection(only=("iommu",))).tasks if "ats=on" in p.task.device)
    (row,) = run_planned(planned)
    assert (row.cell.iommu, row.cell.iommu_options, row.cell.device_options) == ("intel", "device-iotlb=on", "ats=on")
    assert [line for line in text([row], SYSTEMS) if "intel,device-iotlb=on  virtio-blk-pci,ats=on" in line]
    for kind in ("types", "mixes"):
        assert not [p for p in plan(Selection(only=(kind,))).tasks if "," in p.task.iommu], "once is enough"


def test_a_wrong_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'pseries'"):
        plan(Selection(only=("pserie",)))
    with pytest.raises(UsageError, match="did you mean 'intel'"):
        plan(Selection(skip=("intl",)))


def test_numbers_leave_room_for_what_a_boot_gives() -> None:
    task = Task("q35", "none", "virtio-*", "x")
    tasks = [Planned("most", "", task, guest="a"), Planned("most", "", task), Planned("most", "", task, guest="b")]
    whole = replace(plan(Selection(only=("xen",))), tasks=tasks)
    assert [number for number, _ in whole.numbered()] == [0, 2, 3]
    assert whole.count == 5


def test_real_kernels_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `virtiova.guest` has is taken as it is found; one boot gives two cells."""
    row = SimpleNamespace(machine="xen-pv", iommu="none", xen="")
    (cell,) = run_planned(Planned("", "", Task("model", "soft", "honest:rng", "device-writes")))
    parts = {
        "platforms": SimpleNamespace(PLATFORMS={"xen-pv": row}),
        "run": SimpleNamespace(run=lambda platform, bits, store, rules: [cell.cell] * len(bits)),
    }
    monkeypatch.setattr(guests, "available", lambda: True)
    monkeypatch.setattr(guests, "_module", parts.__getitem__)
    assert [p.missing for p in plan(Selection(only=("xen",))).tasks] == [
        "only a real kernel shows it: --guests boots one"
    ]
    (planned,) = plan(Selection(only=("xen",)), extent=Extent(guests=True)).tasks
    assert (planned.guest, planned.span, planned.missing) == ("xen-pv", 2, "")
    rows = run_planned(planned)
    assert [r.product for r in rows] == ["a real kernel: xen-pv"] * 2
    assert answer(planned, Done(0, rows)) == rows
    lost: Done[list[Row]] = Done(0, None, "the worker died of signal 9")
    for done in (lost, Done(0, rows[:1])):
        assert [r.cell.observed for r in answer(planned, done)] == [Path.UNKNOWN] * 2


# -- QEMU installations and device types -------------------------------------------------------------------------


def linked(root: FilePath) -> FilePath:
    """The machine's own QEMU as an installation of its own."""
    place = root / "usr" / "bin"
    place.mkdir(parents=True)
    path = shutil.which(Q35.binary)
    assert path
    (place / Q35.binary).symlink_to(path)
    return root


@pytest.mark.qemu
def test_the_device_types_are_those_that_qemu_lists() -> None:
    types = device_types(Installation(), Q35)
    assert {"virtio-blk-pci", "virtio-gpu-pci", "virtio-balloon-pci"} <= set(types)
    assert len(types) == len(set(types))
    assert not [name for name in types if name.endswith("transitional")]
    assert {p.task.device.split(",")[0] for p in plan(Selection(only=("types",))).tasks} == set(types)


@pytest.mark.qemu
@pytest.mark.parametrize("inside", ["", "usr/bin"])
def test_another_installation_is_a_dimension(tmp_path: FilePath, inside: str) -> None:
    directory = str(linked(tmp_path) / inside)
    chosen = Selection(only=("most", "q35"))
    here, both = plan(chosen).tasks, plan(chosen, [Installation.at(directory)]).tasks
    assert len(both) == 2 * len(here)
    theirs = [planned for planned in both if planned.task.qemu]
    assert len(theirs) == len(here)
    (row,) = run_planned(theirs[0])
    assert (row.cell.observed, row.product) == (Path.DIRECT, here[0].product)


def test_modules_and_firmware_are_those_beside_the_binaries(tmp_path: FilePath) -> None:
    for place in ("usr/bin", "usr/lib/some-triplet/qemu", "usr/share/qemu"):
        (tmp_path / place).mkdir(parents=True)
    binary = tmp_path / "usr" / "bin" / Q35.binary
    binary.write_text("")
    binary.chmod(0o755)
    found = Installation.at(str(tmp_path))
    assert found.binary(Q35) == str(binary)
    assert found.arguments[:2] == ["-L", str(tmp_path / "usr/share/qemu")]
    assert (found.environment or {})["QEMU_MODULE_DIR"] == str(tmp_path / "usr/lib/some-triplet/qemu")
    with pytest.raises(NotPossibleError, match="qemu-system-sparc"):
        found.binary(replace(Q35, binary="qemu-system-sparc64", package="qemu-system-sparc"))
    with pytest.raises(UsageError, match="no qemu-system"):
        Installation.at(str(tmp_path / "usr" / "lib"))
    assert Installation().environment is None


def negotiated(device: str, experiment: str = NEGOTIATE) -> Cell:
    (row,) = run_planned(Planned("types", "QEMU", Task("q35", "intel", device, experiment)))
    return row.cell


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("device", "experiment", "offered", "accepted", "predicted", "observed", "note"),
    [
        ("virtio-balloon-pci", NEGOTIATE, False, False, ["bypass"], "n/a", "FEATURES_OK kept"),
        ("virtio-balloon-pci,iommu_platform=on", NEGOTIATE, True, True, ["translated"], "n/a", "FEATURES_OK kept"),
        ("virtio-balloon-pci,iommu_platform=on", WITHOUT, True, False, ["refused"], "refused", ""),
        ("virtio-gpu-pci,iommu_platform=on", WITHOUT, True, False, ["refused"], "refused", ""),
        (
            "virtio-crypto-pci,iommu_platform=on",
            NEGOTIATE,
            None,
            None,
            [],
            "n/a",
            "does not start it alone: 'cryptodev'",
        ),
        ("virtio-iommu-pci", NEGOTIATE, None, None, [], "n/a", "it is an IOMMU itself"),
        ("virtio-nonsense-pci", NEGOTIATE, None, None, [], "n/a", "unknown device 'virtio-nonsense-pci'"),
    ],
)
def test_negotiation_without_a_driver(
    device: str,
    experiment: str,
    offered: bool | None,
    accepted: bool | None,
    predicted: list[str],
    observed: str,
    note: str,
) -> None:
    cell = negotiated(device, experiment)
    assert (cell.offered, cell.accepted, cell.predicted, cell.observed) == (offered, accepted, predicted, observed)
    assert not cell.mismatch
    assert note in cell.evidence.note


@pytest.mark.qemu
def test_a_negotiation_that_is_kept_where_a_refusal_was_predicted_is_no_silence() -> None:
    planned = Planned("types", "", Task("q35", "intel", "virtio-balloon-pci,iommu_platform=on", NEGOTIATE))
    (row,) = run_with(Runner(jobs=1), RULES.inverted("bit-taken"), planned)
    assert row.cell.observed is Path.UNKNOWN
    assert "kept, where a refusal was predicted" in row.cell.evidence.note


# -- the command -------------------------------------------------------------------------------------------------

SMALL = ["matrix", "--only", "most", "--only", "q35", "--only", "none", "--jobs", "2"]


@pytest.mark.qemu
def test_the_command_writes_every_format(tmp_path: FilePath, capsys: pytest.CaptureFixture[str]) -> None:
    formats = ("json", "html", "svg", "xml", "txt")
    outputs = [word for kind in formats for word in ("-o", str(tmp_path / f"m.{kind}"))]
    assert main.main([*SMALL, *outputs]) == exits.OK
    printed = capsys.readouterr().out
    assert "MOST SYSTEMS" in printed
    assert (tmp_path / "m.txt").read_text() == printed
    cells = json.loads((tmp_path / "m.json").read_text())["cells"]
    assert Counter(cell["observed"] for cell in cells) == {"direct": 19, "refused": 3}
    assert {cell["system"] for cell in cells} == {"most"}
    assert all((tmp_path / f"m.{kind}").stat().st_size > 1000 for kind in formats)


@pytest.mark.qemu
def test_a_second_run_goes_on_where_the_first_was_cut(tmp_path: FilePath, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.jsonl"
    command = [*SMALL, "-j", "--results", str(path)]
    assert main.main(command) == exits.OK
    first = json.loads(capsys.readouterr().out)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:8]) + lines[8][:40])
    assert main.main(command) == exits.OK
    printed = capsys.readouterr()
    assert "the last line was half written, and was cut off" in printed.err
    assert f"going on after 7 of {len(lines) - 1} cells" in printed.err

    def told(document: dict[str, list[dict[str, object]]]) -> list[tuple[object, ...]]:
        keys = ("system", "product", "machine", "device", "offered", "experiment", "predicted", "observed")
        return [tuple(str(cell[key]) for key in keys) for cell in document["cells"]]

    assert told(json.loads(printed.out)) == told(first)
    assert len(path.read_bytes().splitlines()) == len(lines)
    assert main.main([*SMALL, "--full", "-q", "--results", str(path)]) == exits.USAGE
    assert "belongs to another plan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "pseris"], "did you mean 'pseries'"),
        (["-o", "m.pdf"], "the suffix picks the format"),
        (["--jobs", "0"], "--jobs takes a number from 1 on"),
        (["--qemu", "/nonexistent"], "no such directory"),
        (["--only", "sparc", "--skip", "sun4u"], "--only and --skip leave nothing"),
        (["--onyl", "q35"], "did you mean '--only'"),
    ],
)
def test_wrong_usage(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["matrix", *words]) == exits.USAGE
    assert said in capsys.readouterr().err


def test_nothing_here_is_no_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert main.main(["matrix", "--only", "most"]) == exits.OK
    printed = capsys.readouterr().out
    assert "apt-get install qemu-system-x86" in printed
    assert "as predicted, " in printed


def test_the_last_lines_say_what_could_not_be_run_and_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert main.main(["matrix", "--only", "iommu", "--skip", "q35", "--skip", "virt"]) == exits.OK
    _, _, end = capsys.readouterr().out.partition("\nnot run here:\n")
    said = " ".join(end.split())
    assert "riscv-virt with riscv, riscv-virt with virtio: qemu-system-riscv64 is not installed" in said
    assert "'--qemu bookworm-backports' fetches" in said
    assert "s390-zpci with zpci: only a real kernel shows it: --guests boots one" in said
    assert all(len(line) <= 100 for line in end.splitlines())


@pytest.mark.qemu
def test_where_all_could_be_run_nothing_is_said_of_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["matrix", "--only", "nothing", "--only", "virt-mmio"]) == exits.OK
    assert "not run here" not in capsys.readouterr().out


def test_the_list_runs_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virtiova.cli.matrix.collect", None)
    assert main.main(["matrix", "--only", "xen", "--list"]) == exits.OK
    assert capsys.readouterr().out.startswith("xen      xen-pv none virtio-* *  n/a: only a real kernel")


@pytest.mark.parametrize(
    ("observed", "fail_on", "status"),
    [
        (Path.BYPASS, "mismatch", exits.OK),
        (Path.BYPASS, "bypass", exits.FOUND),
        (Path.UNKNOWN, "mismatch", exits.COULD_NOT_LOOK),
        (Path.UNKNOWN, "unknown", exits.FOUND),
        (Path.UNKNOWN, "never", exits.OK),
        (Path.NOT_APPLICABLE, "unknown", exits.OK),
    ],
)
def test_exit_status(
    observed: Path, fail_on: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = Task("model", "soft", "quirky:rng", "device-writes")
    (row,) = run_planned(Planned("xen", "", task))
    shown = replace(row, cell=replace(row.cell, observed=observed))
    monkeypatch.setattr("virtiova.cli.matrix.run_planned", lambda planned: [shown])
    assert main.main(["matrix", "--only", "xen", "--fail-on", fail_on]) == status


def test_memory_does_not_grow_with_the_cells(tmp_path: FilePath) -> None:
    """Thousands of stored cells, every format written, and not a page more than for a few."""
    (row,) = run_planned(Planned("most", "QEMU", Task("model", "soft", "honest:rng", "device-writes")))
    size = 0

    def peak(count: int) -> int:
        nonlocal size
        tracemalloc.start()
        with Results(tmp_path / f"{count}.jsonl", Row, fingerprint(range(count)), count) as results:
            for number in range(count):
                results.add(number, row)
            for kind in ("json", "html", "svg", "xml", "txt"):
                with open(os.devnull, "w", encoding="utf-8") as file:
                    file.writelines(pieces(kind, results))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        size = (tmp_path / f"{count}.jsonl").stat().st_size
        return most

    few = peak(10)
    many = peak(200)
    assert size > 200_000
    assert many < few + 100_000
