# SPDX-License-Identifier: Apache-2.0
"""A scan in every format: it fits, it keeps to what is published of the format, and hostile words stay words."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

import scan_kit as kit
from doc_kit import ROOT
from virtiova.cli import main
from virtiova.report import scan_json, scan_prometheus, scan_text, wide
from virtiova.report.words import plain
from virtiova.result import Path as Way
from virtiova.result.scan import SCHEMA, Scan, ScannedDevice, ScannedMachine

SCANS = {"one": kit.scan(), "hostile": kit.hostile(), "many": kit.many(60), "fleet": kit.fleet(3), "none": Scan()}


@pytest.fixture(params=SCANS)
def scan(request: pytest.FixtureRequest) -> Scan:
    """Every scan of the kit."""
    return SCANS[request.param]


# -- columns -----------------------------------------------------------------------------------------------------


def test_wide_and_combining_characters_are_counted_as_a_terminal_does() -> None:
    assert wide.width("abc") == 3
    assert wide.width("仮想") == 4
    assert wide.width("e\u0301") == 1
    assert wide.cut("仮想網卡", 5) == "仮想…"
    assert wide.cut_middle("0123456789", 7) == "012…789"
    assert wide.pad("仮", 4) == "仮  "


@given(st.text(), st.integers(8, 60))
def test_what_is_cut_and_wrapped_fits(text: str, columns: int) -> None:
    text = plain(text)
    for made in (wide.cut(text, columns), wide.cut_middle(text, columns)):
        assert wide.width(made) <= columns
        assert made == text or wide.ELLIPSIS in made
    lines = [*wide.wrap(text, columns, first="ab", rest="  ")]
    assert all(wide.width(line) <= columns for line in lines)
    whole = "".join(lines).removeprefix("ab")
    assert "".join(whole.split()) == "".join(text.split())


# -- text --------------------------------------------------------------------------------------------------------


def test_text_of_every_verdict() -> None:
    lines = scan_text.document(kit.scan()).splitlines()
    assert lines[0].split() == ["DEVICE", "TYPE", "ADDRESS", "BIT", "33", "DMA", "PATH", "VERDICT"]
    words = {line.split()[0]: line.split()[-1] for line in lines[1:9]}
    assert words == {
        "virtio0": "translated",
        "virtio1": "VA101",
        "virtio2": "direct",
        "virtio3": "(VA101)",
        "virtio4": "MIXED",
        "virtio5": "blocked",
        "virtio6": "VA202",
        "virtio7": "unknown",
    }
    text = "\n".join(lines)
    assert "unknown, virtio7: nothing says whether an IOMMU is in front of it" in text
    assert "VA101 virtio1: goes around the IOMMU: bit 33 is not offered [warning]" in text
    assert "seen: bit 33 is not offered (vm.xml:12)" in text
    assert (
        "could not be decided: VA402 virtio0: the machine's command line (--cmdline or --pid) would settle it" in text
    )
    assert "could not be decided: VA108: virtiova probe: only seeing where bytes land settles it" in text
    assert "could not read: /sys/x: not permitted" in text
    assert "maintenance" not in text
    assert " ".join(lines[-2:]) == (
        "8 devices (1 translated, 1 bypass, 1 direct, 1 stale, 1 mixed, 1 blocked, 1 refused, 1 unknown), "
        "3 findings (1 error, 1 warning, 1 note), 1 ignored, 2 undecided"
    )


def test_verbose_says_all_that_is_known() -> None:
    text = scan_text.document(kit.scan(), verbose=True)
    assert text.startswith("kernel 6.1.0, iommu intel\n")
    assert "\nvirtio1: net, 0000:00:02.0, driver virtio_net, group 0\n" in text
    for words in (
        "  declared: bit 33 not offered, bit 33 not accepted",
        "  predicted: bypass",
        "  observed: nobody looked",
        "  basis: bit 33 is not offered (vm.xml:12)",
        "  assumes: the driver accepts bit 33",
        "  yes: bit-taken: the driver took bit 33 [virtio 1.4, 6.2]",
        "  source: commit 1a937693993f",
        "ignored: VA101 virtio3: goes around the IOMMU: bit 33 is not offered: known, and in the window",
    ):
        assert words in text


@pytest.mark.parametrize("verbose", [False, True])
def test_text_fits_and_is_harmless(scan: Scan, verbose: bool) -> None:
    for line in scan_text.lines(scan, verbose=verbose):
        assert wide.width(line) <= scan_text.WIDTH
        assert line == line.rstrip()
        assert all(char.isprintable() for char in line)


@given(st.lists(st.text(min_size=1, max_size=200), min_size=5, max_size=5), st.integers(0, 30))
def test_whatever_things_are_called_the_table_fits(words: list[str], ids: int) -> None:
    name, kind, address, dma, machine = words
    row = kit.device(name, Way.BYPASS, type=kind, address=address, dma=dma, machine=machine)
    found = [kit.finding(name, f"VA{101 + each}", machine=machine) for each in range(ids)]
    lines = [*scan_text.lines(Scan("guest", [ScannedMachine(machine, "guest")], [row], found))]
    assert all(wide.width(line) <= scan_text.WIDTH for line in lines)
    assert "BYPASS" in lines[1]
    table = " ".join(lines[1 : next((n for n, line in enumerate(lines) if not line), None)])
    assert all(each.id in table for each in found)


def test_wide_names_keep_the_columns_in_line() -> None:
    rows = [kit.device(kit.WIDE), kit.device("short", Way.BYPASS)]
    head, first, second, *_ = scan_text.lines(Scan("guest", [ScannedMachine("vm", "guest")], rows))
    column = head.index("VERDICT")
    assert wide.width(first.partition("translated")[0]) == column
    assert wide.width(second.partition("BYPASS")[0]) == column


def test_the_same_finding_of_many_devices_is_one_block() -> None:
    text = scan_text.document(kit.many(60))
    assert text.count("VA101:") == 1
    assert "  12 devices: virtio1, virtio6," in text
    assert text.count("seen: bit 33 is not offered (vm.xml:12)") == 1
    assert "fix, QEMU: add iommu_platform=on to virtio1 (all 12 likewise)" in text
    assert "fix, libvirt: <driver iommu='on'/> in the device\n" in text


def test_machines_have_headings() -> None:
    text = scan_text.document(kit.fleet(3))
    assert [line for line in text.splitlines() if line.startswith("==")] == [
        "== host0 (guest)",
        "== host1 (guest)",
        "== host2 (guest)",
    ]
    assert text.splitlines()[-1].startswith("3 machines, 15 devices (6 translated, ")


def test_colour_is_nothing_but_colour() -> None:
    found = kit.scan()
    painted = scan_text.document(found, color=True)
    assert "\x1b[31mBYPASS" in painted
    assert "\x1b" not in scan_text.document(found)
    assert re.sub(r"\x1b\[\d+m", "", painted) == scan_text.document(found)


# -- JSON --------------------------------------------------------------------------------------------------------


def test_the_published_schema_is_what_is_written() -> None:
    published = json.loads((ROOT / "docs" / "scan-1.schema.json").read_text())
    assert published == scan_json.schema()
    jsonschema.Draft202012Validator.check_schema(published)


def checked(text: str) -> dict[str, Any]:
    """A document that keeps to the published schema."""
    found: dict[str, Any] = json.loads(text)
    jsonschema.Draft202012Validator(scan_json.schema()).validate(found)
    return found


def test_json_keeps_to_the_schema(scan: Scan) -> None:
    found = checked(scan_json.document(scan))
    assert found["schema"] == SCHEMA
    assert [len(found[each]) for each in ("machines", "devices", "findings", "undecided")] == [
        len(scan.machines),
        len(scan.devices),
        len(scan.findings),
        len(scan.undecided),
    ]
    machines = [checked(line) for line in scan_json.lines(scan)]
    assert [machine["machines"] for machine in machines] == [[each] for each in found["machines"]]
    assert [device for machine in machines for device in machine["devices"]] == found["devices"]


def test_json_has_every_field_and_declared_beside() -> None:
    row = replace(kit.device("net0"), offered=True, accepted=False, backend_offered=None, backend_accepted=True)
    (made,) = checked(scan_json.document(Scan("guest", [ScannedMachine("vm", "guest")], [row])))["devices"]
    assert {*made} == {each.name for each in fields(ScannedDevice)} | {"declared"}
    four = {"offered": True, "accepted": False, "backend_offered": None, "backend_accepted": True}
    assert made["declared"] == four
    assert {name: made[name] for name in four} == four
    assert made["observed"] is None


@pytest.mark.parametrize(
    "change",
    [
        lambda made: made | {"extra": 1},
        lambda made: made | {"schema": "virtiova/scan/2"},
        lambda made: {name: made[name] for name in made if name != "undecided"},
        lambda made: made | {"devices": [made["devices"][0] | {"verdict": "around"}]},
        lambda made: made | {"devices": [made["devices"][0] | {"declared": {}}]},
        lambda made: made | {"findings": [made["findings"][0] | {"severity": "fatal"}]},
    ],
)
def test_the_schema_refuses_what_is_not_written(change: Any) -> None:
    made = json.loads(scan_json.document(kit.scan()))
    checked(json.dumps(made))
    with pytest.raises(jsonschema.ValidationError):
        checked(json.dumps(change(made)))


# -- Prometheus --------------------------------------------------------------------------------------------------


def samples(scan: Scan) -> dict[str, list[tuple[dict[str, str], float]]]:
    """What Prometheus' own client makes of it."""
    text = scan_prometheus.document(scan, version="1.2", now=1700000000.7)
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        assert family.type == "gauge"
        assert family.documentation
        rows = [(sample.labels, sample.value) for sample in family.samples]
        found[family.name.removeprefix("virtiova_scan_")] = rows
        keys = [tuple(sorted(labels.items())) for labels, _ in rows]
        assert len(set(keys)) == len(keys), "no series twice: the collector would refuse the file"
    return found


def test_prometheus_reads_it() -> None:
    found = samples(kit.scan())
    assert found["info"] == [({"schema": SCHEMA, "version": "1.2"}, 1.0)]
    assert found["timestamp_seconds"] == [({}, 1700000000.0)]
    assert ({"machine": "vm", "type": "net", "verdict": "bypass"}, 1.0) in found["devices"]
    one = {"machine": "vm", "device": "virtio1", "id": "VA101", "severity": "warning", "ignored": "false"}
    assert (one, 1.0) in found["finding"]
    assert (one | {"device": "virtio3", "ignored": "true"}, 1.0) in found["finding"]
    assert found["undecided"] == [({"machine": "vm"}, 2.0)]
    assert found["problems"] == [({"machine": "vm"}, 1.0)]
    devices = {labels["device"]: labels for labels, _ in found["device_info"]}
    assert (devices["virtio1"]["offered"], devices["virtio7"]["offered"]) == ("off", "unknown")


def test_prometheus_counts_every_device(scan: Scan) -> None:
    assert sum(value for _, value in samples(scan)["devices"]) == len(scan.devices)


def test_labels_come_back_as_they_were() -> None:
    name = 'a\\n"b"\n\\'
    found = samples(Scan("guest", [ScannedMachine(name, "guest")], [kit.device(name, machine=name)]))
    assert found["devices"][0][0]["machine"] == name


def test_the_order_is_stable() -> None:
    found = kit.fleet(5)
    turned = Scan("several", found.machines[::-1], found.devices[::-1], found.findings[::-1])
    assert len({scan_prometheus.document(each, version="1", now=1) for each in (found, turned)}) == 1


# -- all of them, of real input ----------------------------------------------------------------------------------

COMMAND = """\
qemu-system-x86_64 -M q35 -name 'web & <mail>' \\
  -device intel-iommu,intremap=on \\
  -device pcie-root-port,id=rp0,chassis=1 \\
  -device virtio-net-pci,id=net0,bus=rp0,iommu_platform=on \\
  -device virtio-blk-pci,id=disk0 \\
  -device virtio-rng-pci,id=rng0,bus=pcie.0
"""


def test_a_command_line_in_every_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("vm.sh").write_text(COMMAND)
    Path("ignore.txt").write_text("VA101@rng0  nothing that is secret\n")
    names = [f"scan.{suffix}" for suffix in ("txt", "json", "jsonl", "sarif", "html", "svg", "prom")]
    words = [word for name in names for word in ("-o", name)]
    assert main.main(["scan", "--cmdline", "vm.sh", "--ignore-file", "ignore.txt", "-q", *words]) == 1
    made = checked(Path("scan.json").read_text())
    assert checked(Path("scan.jsonl").read_text()) == made
    devices = {each["name"]: each for each in made["devices"]}
    assert {name: each["verdict"] for name, each in devices.items()} == {
        "net0": "translated",
        "disk0": "bypass",
        "rng0": "bypass",
    }
    assert devices["net0"]["declared"]["offered"] is True
    ignored = {each["device"]: each["ignored"] for each in made["findings"] if each["id"] == "VA101"}
    assert ignored == {"disk0": "", "rng0": "nothing that is secret"}
    results = json.loads(Path("scan.sarif").read_text())["runs"][0]["results"]
    lines = {each["message"]["text"].split(":")[0]: each["locations"][0]["physicalLocation"] for each in results}
    assert lines["disk0"]["artifactLocation"] == {"uri": "vm.sh"}
    assert COMMAND.splitlines()[lines["disk0"]["region"]["startLine"] - 1].endswith("id=disk0 \\")
    families = text_string_to_metric_families(Path("scan.prom").read_text())
    found = [
        sample.labels for family in families if family.name == "virtiova_scan_finding" for sample in family.samples
    ]
    assert {each["device"] for each in found if each["ignored"] == "false"} >= {"disk0"}
    assert {each["machine"] for each in found} == {"web & <mail>"}
    assert "web &amp; &lt;mail&gt;" in Path("scan.html").read_text()
    assert "disk0" in "".join(ElementTree.parse("scan.svg").getroot().itertext())
    assert Path("scan.txt").read_text().startswith("DEVICE  ")
