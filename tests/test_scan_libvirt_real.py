# SPDX-License-Identifier: Apache-2.0
"""Two ways to say the same machine: a domain, and the command line that the real libvirt makes of it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from libvirt_kit import DATA, PRIVILEGED, Libvirt, missing
from virtiova.collect import keys as k
from virtiova.collect import libvirt, qemu
from virtiova.collect.facts import View, keys
from virtiova.result.scan import Place
from virtiova.scan import scan_views

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"n/a: {missing()}")

ALL = sorted(path.stem for path in DATA.glob("*.xml"))
STARTED = [
    "q35-intel",
    "pc",
    "expander",
    pytest.param("aarch64-smmuv3", marks=pytest.mark.sweep),
    pytest.param("pseries", marks=pytest.mark.sweep),
]
# libvirt resolves the machine's version when it takes a domain, and gives out addresses.
BY_LIBVIRT = {k.MACHINE_TYPE.name, k.PLACE.name, k.ADDRESS.name}


@pytest.fixture(scope="module")
def real() -> Iterator[Libvirt]:
    with Libvirt() as made:
        yield made


def says(view: View, without: frozenset[str] | set[str] = frozenset()) -> dict[str, object]:
    """All that is said of a machine, but where that was read and how sure it is."""
    scan = scan_views([view])
    said: dict[str, object] = {"problems": view.problems}
    known = keys()
    for fact in view.machine:
        if fact.key not in without:
            said.setdefault(fact.key, view.machine.get(known[fact.key]))
    for device, row in zip(view.devices, scan.devices, strict=True):
        said[device.name] = {
            "facts": {fact.key: fact.value for fact in device.facts if fact.key not in without},
            "offered": row.offered,
            "accepted": row.accepted,
            "predicted": row.predicted,
            "verdict": row.verdict,
            "dma": row.dma,
            "iommu": row.iommu,
            "backend": row.backend,
            "assumes": row.assumes,
            "why": row.why,
        }
    said["findings"] = sorted((each.id, each.device, each.severity, each.fix.get("libvirt", ""))
                              for each in scan.findings)  # fmt: skip
    said["undecided"] = sorted((each.id, each.device, each.settle) for each in scan.undecided)
    return said


def of_xml(text: str, without: frozenset[str] | set[str] = frozenset()) -> dict[str, object]:
    return says(libvirt.collect(text.encode(), "vm.xml"), without)


def of_words(data: bytes, without: frozenset[str] | set[str] = frozenset()) -> dict[str, object]:
    return says(qemu.collect(qemu.words_of(data), Place("command line", "vm.args")), without)


def places_of(text: str) -> dict[str, str]:
    """Where the devices of a domain are, as far as it says so."""
    view = libvirt.collect(text.encode(), "vm.xml")
    return {each.name: place for each in view.devices if (place := each.facts.get(k.PLACE))}


@pytest.mark.parametrize("name", ALL)
def test_the_domains_of_these_tests_are_valid(name: str, tmp_path: Path) -> None:
    if shutil.which("xmllint") is None:
        pytest.skip("xmllint is missing (apt install libxml2-utils)")
    text = (DATA / f"{name}.xml").read_text().replace("@dir@", "/run/x").replace("@s390x@", "/usr/bin/x")
    (tmp_path / "vm.xml").write_text(text)
    done = subprocess.run(
        ["virt-xml-validate", tmp_path / "vm.xml", "domain"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", STARTED)
def test_a_domain_and_its_command_line_say_the_same(real: Libvirt, name: str) -> None:
    text = real.text(name)
    written = real.defined(text, name)
    with real.started(text, name):
        live = real.virsh(f"dumpxml {name}")
        status = (real.root / f"run/qemu/{name}.xml").read_text()
    log = real.log(name)
    started = of_words(log)
    assert started["problems"] == []
    # As virsh prints it while it runs, as libvirt keeps it while it runs, as it keeps it for good.
    assert of_xml(live) == started
    assert of_xml(status) == started
    assert of_xml(f"<!-- made by libvirt -->\n{written}") == started
    # As somebody wrote it, before libvirt knew it.
    assert of_xml(text, BY_LIBVIRT) == of_words(log, BY_LIBVIRT)
    # Where it says already where a device is, it is there.
    places = places_of(text)
    assert places.items() <= places_of(live).items()
    assert places or name in ("aarch64-smmuv3", "pseries")


def test_back_ends_outside_of_qemu_are_the_same(real: Libvirt) -> None:
    name = "vhost-user"
    text = real.text(name)
    written = real.defined(text, name)
    # There is nobody at the other end of its sockets. What it was started with is in the log all the same.
    real.virsh(f"create --paused {real.file(text)}", fails=True)
    said = of_words(real.log(name))
    assert said["net0"]["backend"] == said["virtio-disk0"]["backend"] == "vhost-user"  # type: ignore[index]
    assert of_xml(written) == said
    assert of_xml(text, BY_LIBVIRT) == of_words(real.log(name), BY_LIBVIRT)


@pytest.mark.skipif(not PRIVILEGED, reason="as a session libvirt does no virtiofs, and this is none of root's")
def test_virtiofs_and_vsock_are_the_same(real: Libvirt) -> None:
    # There is no /dev/vhost-vsock to start it with; what libvirt exports has no network cards here.
    text = real.text("virtiofs")
    # The socket of a virtiofsd that libvirt starts is not in the domain.
    without = {k.BACKEND_SOCKET.name}
    assert of_xml(real.defined(text, "virtiofs"), without) == of_words(real.native(text), without)


def test_what_libvirt_exports_has_other_network_cards(real: Libvirt) -> None:
    """``domxml-to-native`` makes every network card a plain tap, and forgets its options: no word for it in a scan."""
    text = real.text("vhost-user")
    exported = of_words(real.native(text))["net0"]
    assert exported["offered"] is False  # type: ignore[index]
    assert of_xml(text)["net0"]["offered"] is True  # type: ignore[index]
