# SPDX-License-Identifier: Apache-2.0
"""What is gathered: by us and by the script, of this machine and of made ones; nothing secret, nothing half-written."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import stat
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gather_kit import PCI, Recording, boxed, facts, machine
from virtiova.cli import exits
from virtiova.cli.main import main
from virtiova.collect import keys as k
from virtiova.collect import linux, messages, redact
from virtiova.collect.box import HEADER, SCHEMA, read_box
from virtiova.collect.facts import ViewKind
from virtiova.collect.files import CPU, DMESG, IOMEM, KERNEL_OPTIONS
from virtiova.collect.gather import gather, without_secrets, write
from virtiova.collect.gather_script import script
from virtiova.collect.gathered import tree_of, views
from virtiova.collect.tree import LIMIT, LiveTree
from virtiova.errors import NotPossibleError
from virtiova.guest.platforms import CLOUD
from virtiova.packages.store import Store

# -- what is read is what is gathered --------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [False, True])
def test_all_that_a_collector_reads_is_gathered(made: bool, tmp_path: Path) -> None:
    """Each question to the files of this machine and of a made one has the same answer out of its box."""
    files = LiveTree(str(machine(tmp_path / "root")) if made else "/")
    tree = Recording(files)
    here = linux.collect(tree)
    asked = {question: answer for question, answer in tree.asked.items() if question[1] not in VOLATILE}
    assert tree.not_gathered() == []
    box = tree_of(read_box(str(boxed(files, tmp_path / "box"))))
    wrong = {}
    for (verb, path), answer in asked.items():
        again = box.read(path, tree.limits[path]) if verb == "read" else getattr(box, verb)(path)
        if again != answer and not (verb == "names" and path in PARTLY) and path != KERNEL_OPTIONS:
            wrong[verb, path] = (answer, again)
    assert wrong == {}
    assert facts(linux.collect(box))[0] == facts(here)[0]
    assert len(here.devices) > 0 or not made


VOLATILE = {CPU, IOMEM}
PARTLY = {"/proc", "/sys/firmware/acpi/tables"}
"""Folders of which only what is wanted is gathered."""


def test_the_messages_that_rules_ask_for_are_gathered() -> None:
    wanted = re.compile("|".join(DMESG), re.IGNORECASE)
    assert [m.text for m in messages.MESSAGES if m.who.startswith("Linux, ") and not wanted.search(m.text)] == []


def test_what_is_not_in_the_list_is_noticed(tmp_path: Path) -> None:
    tree = Recording(LiveTree(str(machine(tmp_path))))
    tree.read("/proc/keys")
    tree.link(f"{PCI}/driver")
    tree.read(f"{PCI}/rom")
    tree.read("/sys/bus/virtio/devices/virtio9/secret")
    assert tree.not_gathered() == ["/proc/keys", "/sys/bus/virtio/devices/virtio9/secret", f"{PCI}/rom"]


def ran(words: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, **how)


# -- nothing secret --------------------------------------------------------------------------------------------------


def test_passwords_stay_where_they_are(tmp_path: Path) -> None:
    box = read_box(str(boxed(LiveTree(str(machine(tmp_path / "root"))), tmp_path / "box")))
    assert not [name for name, data in box.files.items() if b"hush" in data]
    assert box.files["qemu/12.cmdline"].split(b"\0")[4:] == [b":1,password=REMOVED", b"-S", b""]
    assert not any("13" in name for name in box.files), "no other process's command line"
    xml = box.files["libvirt/etc/libvirt/qemu/vm.xml"].decode()
    assert xml.splitlines()[1:3] == [" <graphics type='vnc' passwd='REMOVED'/>", " <name>vm</name>"]
    assert box.files["tree/proc/cmdline"] == b"quiet intel_iommu=on app.token=REMOVED root=/dev/vda\n"


SECRETS = {
    redact.WORDS: (
        ("secret,id=s,data=hush,,more,format=raw", "secret,id=s,data=REMOVED,format=raw"),
        ('{"qom-type": "secret", "data": "hu\\"sh"}', '{"qom-type": "secret", "data": "REMOVED"}'),
        ("rbd:pool/image:id=x:key=aHVzaA==:mon_host=h,if=none", "rbd:pool/image:id=x:key=REMOVED,if=none"),
        ("nbd://me:hush@host/disk", "nbd://me:REMOVED@host/disk"),
        ("https,file.cookie=hush,proxy-password=hush,id=d", "https,file.cookie=REMOVED,proxy-password=REMOVED,id=d"),
        ("quiet token=hush intel_iommu=on", "quiet token=REMOVED intel_iommu=on"),
        ("root_password=hush quiet", "root_password=REMOVED quiet"),
        ("console=ttyS0 root_password=hush", "console=ttyS0 root_password=REMOVED"),
        ("name=opt/ignition,string={hush,, hush}", "name=opt/ignition,string=REMOVED"),
        ("type=11,value=io.systemd.credential:root=hush", "type=11,value=io.systemd.credential:root=REMOVED"),
        ("virtio-net-pci,netdev=n,iommu_platform=on,mac=52:54:0:0:0:1", None),
        ("tls-creds-x509,id=t,passwordid=sec0", None),
        ("--password\nhush\n--api-key\nhush,x=y\n-S", "--password\nREMOVED\n--api-key\nREMOVED\n-S"),
        ("--token", "--token"),
    ),
    redact.XML: (
        ("<graphics passwd=\"hush\" port='5900'/>", "<graphics passwd=\"REMOVED\" port='5900'/>"),
        ("<qemu:arg value='secret,id=a,data=hush'/>", "<qemu:arg value='secret,id=a,data=REMOVED'/>"),
        ("<qemu:env name='TOKEN' value='hush'/>", "<qemu:env name='TOKEN' value='REMOVED'/>"),
        (
            "<qemu:env name='A' value='hush'/><qemu:env name='B' value='hush'/>",
            "<qemu:env name='A' value='REMOVED'/><qemu:env name='B' value='REMOVED'/>",
        ),
        ("<qemu:arg value='password=hush'/>", "<qemu:arg value='password=REMOVED'/>"),
        ("<cmdline>quiet rootpassword=hush</cmdline>", "<cmdline>quiet rootpassword=REMOVED</cmdline>"),
        ("<qemu:arg value='{\"data\":\"hush\"}'/>", "<qemu:arg value='{\"data\":\"REMOVED\"}'/>"),
        (
            '<qemu:arg value="{&quot;data&quot;:&quot;hush&quot;}"/>',
            '<qemu:arg value="{&quot;data&quot;:&quot;REMOVED&quot;}"/>',
        ),
        ("<session>aHVzaA==</session>", "<session>REMOVED</session>"),
        ("<cookie name='a'>hush</cookie>", "<cookie name='a'>REMOVED</cookie>"),
        ("<entry name='opt/x'>hush</entry>", "<entry name='opt/x'>REMOVED</entry>"),
        ("<entry>io.systemd.credential:a=hush</entry>", "<entry>io.systemd.credential:a=REMOVED</entry>"),
        ("<driver name='qemu' iommu='on'/>", None),
        ("<metadata>", None),
    ),
    redact.KERNEL: (
        ("quiet rd.token=hush,x ip=dhcp", "quiet rd.token=REMOVED ip=dhcp"),
        ("netroot=iscsi:me:hush@10.0.0.1::::iqn", "netroot=iscsi:me:REMOVED@10.0.0.1::::iqn"),
        ("quiet systemd.set_credential=a:hush x", "quiet systemd.set_credential=REMOVED x"),
        ("intel_iommu=on iommu.passthrough=1 swiotlb=force", None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("rules", SECRETS, ids=["words", "xml", "kernel"])
def test_the_script_removes_the_same(rules: tuple[tuple[str, str], ...], busybox: str) -> None:
    """The same expressions in Python, in sed, and in busybox's."""
    before = "".join(f"{line}\n" for line, _ in SECRETS[rules])
    after = "".join(f"{cleaned or line}\n" for line, cleaned in SECRETS[rules])
    assert redact.redacted(before, rules) == after
    for sed in ("sed", f"{busybox} sed"):
        done = ran(["sh", "-c", f"{sed} -E {redact.sed(rules)}"], input=before)
        assert (done.stdout, done.stderr) == (after, "")


def test_a_command_line_keeps_its_words() -> None:
    words = b"qemu\0-name\0a\nb\0\xff\0password=x\0"
    assert without_secrets(words) == b"qemu\0-name\0a b\0\xff\0password=REMOVED\0"


# -- the script ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def busybox() -> str:
    """A real busybox: the one that guests are booted with."""
    wanted, store = CLOUD.wanted()[1], Store()
    try:
        store.get(wanted)
    except NotPossibleError as reason:
        pytest.skip(str(reason))
    path = store.root / wanted.folder / "busybox"
    path.chmod(0o755)
    return str(path)


def only_busybox(busybox: str, folder: Path) -> dict[str, str]:
    """An environment in which every command is busybox."""
    listed = subprocess.run([busybox, "--list"], capture_output=True, text=True, timeout=20, check=True)
    folder.mkdir()
    for name in listed.stdout.split():
        (folder / name).symlink_to(busybox)
    return {"PATH": str(folder)}


@pytest.mark.parametrize("shell", ["dash", "busybox"])
def test_the_script_makes_the_same_box(shell: str, busybox: str, tmp_path: Path) -> None:
    """Under both shells, with the system's tools or with busybox's alone: the files that Python gathers."""
    environment = only_busybox(busybox, tmp_path / "bin") if shell == "busybox" else {"PATH": os.environ["PATH"]}
    (tmp_path / "tmp").mkdir()
    path = tmp_path / "gather.sh"
    path.write_text(script())
    fake = tmp_path / "qemu-system-x"
    fake.write_text("#!/bin/sh\nread line\n")
    fake.chmod(0o755)
    words = [str(fake), "-object", "secret,id=s,data=hush", "-vnc", ":1,password=hush"]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as running:
        try:
            until(lambda: Path(f"/proc/{running.pid}/comm").read_text() == "qemu-system-x\n")
            shell_path = shutil.which("dash" if shell == "dash" else "sh", path=environment["PATH"]) or "sh"
            environment["TMPDIR"] = str(tmp_path / "tmp")
            done = ran([shell_path, str(path), "box.tar.gz"], cwd=tmp_path, env=environment)
            ours = read_box(str(boxed(LiveTree(), tmp_path / "ours")))
        finally:
            running.communicate(b"\n")
    assert done.returncode == 0, done.stderr
    theirs = read_box(str(tmp_path / "box.tar.gz"))
    assert theirs.header["host"] == ours.header["host"]
    assert theirs.header["problems"] == ours.header["problems"]
    assert theirs.files[f"qemu/{running.pid}.cmdline"] == ours.files[f"qemu/{running.pid}.cmdline"]
    assert b"hush" not in theirs.files[f"qemu/{running.pid}.cmdline"]
    assert stable(theirs.files) == stable(ours.files)
    for box in (theirs, ours):
        lines = box.files["tree/proc/iomem"].decode().splitlines()
        assert any(line.endswith(" : System RAM") for line in lines)
        assert not any("Kernel" in line for line in lines), "where the kernel lies stays here"
    view, same = (linux.collect(tree_of(box)) for box in (theirs, ours))
    assert facts(view) == facts(same)
    assert stat.S_IMODE((tmp_path / "box.tar.gz").stat().st_mode) == 0o600
    assert list((tmp_path / "tmp").iterdir()) == []


def stable(files: dict[str, bytes]) -> dict[str, bytes]:
    """Without what changes from moment to moment, and the machines that others run here meanwhile."""
    moving = {"virtiova-gather.json", "log/dmesg", *(f"tree{path}" for path in VOLATILE)}
    sorted_links = {"links": b"\n".join(sorted(files["links"].splitlines()))}
    kept = {
        name: data for name, data in files.items() if name not in moving and not name.startswith(("qemu/", "backend/"))
    }
    return {**kept, **sorted_links}


def until(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_script_says_what_it_could_not_read(busybox: str, tmp_path: Path) -> None:
    """Also a path that would break the JSON, and one that is left out."""
    odd = script().replace("@HYPERVISORS@", "x").split("for p in /proc/")[0]
    odd += 'get /proc/self/mem\nproblem \'a "b" \\c\'\ncat "$work/.problems"\n'
    (tmp_path / "odd.sh").write_text(odd)
    done = ran(["sh", str(tmp_path / "odd.sh"), "x"], cwd=tmp_path)
    assert "/proc/self/mem: Input/output error\n" in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_without_root_it_says_what_it_could_not_read(tmp_path: Path) -> None:
    """By the script, as by us: the same files, and the same reasons."""
    for name in ("theirs", "tmp"):
        (tmp_path / name).mkdir(mode=0o777)
        (tmp_path / name).chmod(0o777)
    for folder in (tmp_path, *list(tmp_path.parents)[:3]):
        folder.chmod(folder.stat().st_mode | 0o011)
    done = subprocess.run(
        ["sh", "-s", "theirs/box"], input=script(), cwd=tmp_path, env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
        user=65534, group=65534, extra_groups=[], capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs = read_box(str(tmp_path / "theirs/box"))
    assert theirs.header["root"] is False
    tables = [name for name in LiveTree().names("/sys/firmware/acpi/tables") if name in ("DMAR", "FACP", "IVRS")]
    for name in tables:
        assert f"/sys/firmware/acpi/tables/{name}: Permission denied" in theirs.header["problems"]
        assert f"could not read /sys/firmware/acpi/tables/{name}: Permission denied" in done.stderr
    tree = tree_of(theirs)
    assert tree.names("/sys/firmware/acpi/tables") == tables
    assert [device.name for device in linux.collect(tree).devices] == LiveTree().names("/sys/bus/virtio/devices")


@pytest.mark.parametrize("shell", ["dash", "busybox"])
def test_whoever_stops_the_script_finds_nothing_of_it(shell: str, busybox: str, tmp_path: Path) -> None:
    """Stopped in the middle: no file, no folder, not even a part of one."""
    path = only_busybox(busybox, tmp_path / "bin")["PATH"] if shell == "busybox" else os.environ["PATH"]
    (tmp_path / "tmp").mkdir()
    (tmp_path / "gather.sh").write_text(script().replace("\nstring() {", "\nread -r go\nstring() {"))
    words = [shutil.which("dash" if shell == "dash" else "sh", path=path) or "sh", "gather.sh", "box"]
    environment = {"PATH": path, "TMPDIR": str(tmp_path / "tmp")}
    with subprocess.Popen(words, cwd=tmp_path, env=environment, stdin=subprocess.PIPE) as process:
        until(lambda: bool(list((tmp_path / "tmp").glob("*/tree/sys"))))
        process.terminate()
        assert process.wait(20) == 130
    assert sorted(each.name for each in tmp_path.iterdir() if each.name != "bin") == ["gather.sh", "tmp"]
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    """And a device that was named stays one."""
    (tmp_path / "gather.sh").write_text(script())
    assert ran(["sh", "gather.sh", "/dev/full"], cwd=tmp_path).returncode == 3
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)
    assert ran(["sh", "gather.sh", "a", "b"], cwd=tmp_path).returncode == 2
    assert main(["gather", "-q", "-o", "/dev/full"]) == exits.COULD_NOT_LOOK


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    box = tmp_path / "box.tar.gz"
    log = tmp_path / "a log"
    log.write_text("qemu: -object secret,data=hush: boom\n")
    assert main(["gather", "-q", "-o", str(box), "--log", str(log)]) == exits.OK
    assert stat.S_IMODE(box.stat().st_mode) == 0o600
    assert read_box(str(box)).files["log/a_log"] == b"qemu: -object secret,data=REMOVED\n"
    assert [path.name for path in tmp_path.iterdir()] == ["box.tar.gz", "a log"] or len(list(tmp_path.iterdir())) == 2
    assert main(["gather", "-q", "-o", "-"]) == exits.OK
    packed = capsysbinary.readouterr().out
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        assert archive.getnames()[0] == "virtiova-gather.json"
        assert all(member.isreg() or member.isdir() for member in archive)
    assert main(["gather", "--script"]) == exits.OK
    assert capsysbinary.readouterr().out.decode() == script()


@pytest.mark.parametrize("words", [[], ["-o", "/no/such/folder/box"], ["-o", "box", "--log", "/no/such"],
                                   ["--script", "--log", "x"]])  # fmt: skip
def test_a_wrong_command(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["gather", *words]) == exits.USAGE
    assert list(tmp_path.iterdir()) == []


# -- machines of a host ----------------------------------------------------------------------------------------------


def test_a_host_and_the_machines_on_it(tmp_path: Path) -> None:
    """The system, a QEMU that runs there, libvirt's domain, a back end, a log: a view each."""
    root = machine(tmp_path / "root")
    (root / "proc/14").mkdir()
    (root / "proc/14/comm").write_text("virtiofsd\n")
    (root / "proc/14/cmdline").write_bytes(b"/usr/libexec/virtiofsd\0--socket-path\0/run/fs.sock\0")
    (root / "proc/15").mkdir()
    (root / "proc/15/comm").write_text("qemu-system-arm\n")
    (root / "proc/15/cmdline").write_bytes(b"qemu-system-arm\0-device\0{\0")
    words = b"qemu-system-x86_64\0-M\0q35\0-device\0virtio-rng-pci,iommu_platform=on\0-device\0intel-iommu\0"
    (root / "proc/12/cmdline").write_bytes(words)
    domain = "<domain type='kvm'><name>vm</name><os><type arch='x86_64' machine='q35'>hvm</type></os></domain>"
    (root / "etc/libvirt/qemu/vm.xml").write_text(domain)
    log = tmp_path / "vm.log"
    log.write_text("qemu-system-x86_64: iommu_platform=true is not supported by the device\n")
    path = tmp_path / "box.tar.gz"
    with path.open("wb") as file:
        gather(file, LiveTree(str(root)), logs=[str(log)])
    found = {view.source.removeprefix(f"{path}: "): view for view in views(str(path))}
    kinds = {name: view.kind for name, view in found.items()}
    assert kinds == {
        str(path): ViewKind.GUEST,
        "qemu/12.cmdline": ViewKind.CONFIGURATION,
        "qemu/15.cmdline": ViewKind.CONFIGURATION,
        "backend/14.cmdline": ViewKind.BACKEND,
        "libvirt/etc/libvirt/qemu/vm.xml": ViewKind.CONFIGURATION,
        "log/vm.log": ViewKind.LOG,
    }
    assert [device.facts.get(k.TYPE) for device in found["qemu/12.cmdline"].devices] == ["rng"]
    assert found["backend/14.cmdline"].devices[0].facts.get(k.BACKEND_SOCKET) == "/run/fs.sock"
    assert [view.source for view in found.values() if view.empty] == [f"{path}: qemu/15.cmdline"]
    assert "qemu/15.cmdline" in found["qemu/15.cmdline"].problems[0]


def test_what_was_read_off_registers_comes_along(tmp_path: Path) -> None:
    """Also where the rest of the offer is not in any file."""
    with (tmp_path / "box").open("wb") as file:
        files = {HEADER: json.dumps({"schema": SCHEMA, "offered": {"virtio0": False, "virtio1": 7}}).encode()}
        write(file, {**files, "tree/sys/bus/virtio/devices/virtio0/device": b"0x2\n", "tree/sys/class/x": b""})
    device = views(str(tmp_path / "box"))[0].devices[0]
    assert device.facts.get(k.OFFERED) is False
    here = {each.name: each.facts.get(k.OFFERED) for each in linux.collect(LiveTree()).devices}
    there = {
        each.name: each.facts.get(k.OFFERED) for each in views(str(boxed(LiveTree(), tmp_path / "own")))[0].devices
    }
    assert here == there


def test_a_file_that_may_not_be_read_is_there_all_the_same(tmp_path: Path) -> None:
    """Who is not root sees that there is a DMAR, and not what is in it."""
    root = machine(tmp_path / "root")
    (root / "sys/firmware/acpi/tables").mkdir(parents=True)
    (root / "sys/firmware/acpi/tables/DMAR").write_bytes(b"DMAR")

    class Denied(LiveTree):
        def read(self, path: str, limit: int = LIMIT) -> bytes | None:
            if path.endswith("/DMAR"):
                self.problems.append(f"{path}: Permission denied")
                return None
            return super().read(path, limit)

    tree = tree_of(read_box(str(boxed(Denied(str(root)), tmp_path / "box"))))
    path = "/sys/firmware/acpi/tables/DMAR"
    assert tree.names("/sys/firmware/acpi/tables") == ["DMAR"]
    assert (tree.exists(path), tree.read(path)) == (True, None)
    assert linux.collect(tree).machine.get(k.FIRMWARE_TABLES) == ("DMAR",)
    assert f"{path}: Permission denied" in linux.collect(tree).problems


@pytest.mark.parametrize("rules", [redact.WORDS, redact.XML, redact.KERNEL], ids=["words", "xml", "kernel"])
def test_what_only_begins_like_a_secret_takes_no_time(rules: tuple[tuple[str, str], ...]) -> None:
    """A log is gathered up to 4 MiB: of a quarter of one that is made to be slow, squares would take minutes."""
    for begin in ("token", "opt/ ", "io.systemd.credential", "iscsi:", "<qemu:env ", "<cookie "):
        start = time.perf_counter()
        redact.redacted(begin * ((256 << 10) // len(begin)), rules)
        assert time.perf_counter() - start < 10, begin
