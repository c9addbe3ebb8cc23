# SPDX-License-Identifier: Apache-2.0
"""Back ends by their command lines: of every known program, of processes that run, and what they really offer."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scan_rule_kit import said
from sysfs_kit import Box
from vhost_user_kit import TESTPMD, installed
from virtiova.cli.main import parser
from virtiova.cli.scan_inputs import views
from virtiova.collect import backends, commands, qemu
from virtiova.collect import keys as k
from virtiova.collect.facts import View, ViewKind
from virtiova.collect.products import DPDK_ABI, PRODUCTS
from virtiova.collect.tree import LiveTree
from virtiova.result.scan import Place
from virtiova.scan import backends as scan_backends
from virtiova.scan import scan_views

AT = Place("proc", "/proc/7/cmdline")
VIRTIOFSD = "/usr/lib/qemu/virtiofsd"

KNOWN: dict[str, tuple[str, dict[str, bool | None]]] = {
    "dpdk-testpmd -l 0,1 --vdev net_vhost0,iface=/run/a,queues=1,iommu-support=1 -- -i": ("dpdk", {"/run/a": True}),
    "/usr/bin/dpdk-testpmd --vdev=net_vhost0,iface=/run/a -- -i": ("dpdk", {"/run/a": False}),
    "testpmd --vdev net_vhost0,iface=/run/a,iommu-support=0 --vdev net_vhost1,iface=/run/b,iommu-support=1": (
        "dpdk",
        {"/run/a": False, "/run/b": True},
    ),
    "dpdk-testpmd --vdev net_tap0,iface=tap0 --vdev": ("dpdk", {"tap0": False}),
    "dpdk-vhost -l 0 -- --socket-file /run/a -p 1": ("dpdk", {"/run/a": False}),
    "/usr/lib/qemu/virtiofsd --socket-path=/run/v -o source=/srv": ("virtiofsd of QEMU", {"/run/v": False}),
    "/usr/libexec/virtiofsd --socket-path /run/v --shared-dir /srv": ("virtiofsd 1.x", {"/run/v": False}),
    "virtiofsd --fd=11 --shared-dir /srv": ("virtiofsd 1.x", {}),
    "qemu-storage-daemon --export type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=/run/q": (
        "qemu-storage-daemon",
        {"/run/q": False},
    ),
    'qemu-storage-daemon --export {"type":"vhost-user-blk","addr":{"type":"unix","path":"/run/q"},"writable":true}': (
        "qemu-storage-daemon",
        {"/run/q": False},
    ),
    "qemu-storage-daemon --export type=nbd,id=e,addr.path=/run/q": ("qemu-storage-daemon", {}),
    "vhost-device-rng --socket-path /run/r": ("vhost-device-rng", {"/run/r": False}),
    "vhost-device-vsock --vm guest-cid=3,socket=/run/s,uds-path=/run/u": ("vhost-device-vsock", {"/run/s": False}),
    "vhost_user_block --block-backend path=/d,socket=/run/c": ("vhost_user_block", {"/run/c": False}),
    "/usr/libexec/vhost-user-gpu -s /run/g": ("libvhost-user", {"/run/g": False}),
    "spdk_tgt -m 0x1 -S /var/tmp": ("spdk", {}),
    "ovs-vswitchd unix:/run/db.sock --pidfile": ("ovs-vswitchd", {}),
    "virtiova serve blk disk --socket-path /run/s": ("virtiova", {"/run/s": True}),
    "python3 -m virtiova serve rng --socket-path=/run/s": ("virtiova", {"/run/s": True}),
    "/usr/bin/python3 /usr/bin/virtiova serve rng --socket-path=/run/s": ("virtiova", {"/run/s": True}),
}
UNKNOWN = [
    "", "qemu-system-x86_64 -m 1G", "virtiova probe", "python3 -m http.server", "python3", "bash -c virtiofsd",
    "vhost", "timeout 5 dpdk-testpmd --vdev net_vhost0,iface=/run/a",
]  # fmt: skip


@pytest.mark.parametrize("line", KNOWN)
def test_what_is_known(line: str) -> None:
    served = backends.recognise(line.split())
    assert served is not None
    assert (served.name, served.sockets) == KNOWN[line]


@pytest.mark.parametrize("line", UNKNOWN)
def test_what_is_not(line: str) -> None:
    assert backends.recognise(line.split()) is None
    view = backends.collect(line.split(), AT)
    assert view.empty
    assert view.problems


def test_each_product_is_recognised_and_has_a_source() -> None:
    assert all(product.source for product in PRODUCTS)
    seen = {id(served.product) for line in KNOWN if (served := backends.recognise(line.split()))}
    missing = [p.commands[0] for p in PRODUCTS if id(p) not in seen and p.commands[0] != "vhost_user_net"]
    assert missing == []


def test_what_a_view_of_it_says() -> None:
    (line, *_) = KNOWN
    view = backends.collect(line.split(), AT)
    assert view.kind is ViewKind.BACKEND
    (device,) = view.devices
    assert device.facts.get(k.BACKEND) == "vhost-user"
    assert device.facts.get(k.BACKEND_SOCKET) == "/run/a"
    assert device.facts.get(k.BACKEND_OFFERED) is True
    assert device.facts.get(k.BACKEND_OPTIONS) == tuple(line.split())
    assert device.facts.get(k.TYPE) == "net"


@given(st.lists(st.text(max_size=40), max_size=8), st.sampled_from(sorted(KNOWN)))
def test_no_words_are_a_traceback(more: list[str], line: str) -> None:
    backends.collect([*line.split(), *more], AT)
    backends.recognise(more)
    commands.of_file("\0".join([*line.split(), *more, ""]).encode("utf-8", "replace"), "x")


@given(st.binary(max_size=200))
def test_no_bytes_are_a_traceback(data: bytes) -> None:
    backends.recognise(backends.words_of(data))
    backends.version_of(data)


def test_what_is_nested_too_deep_says_nothing() -> None:
    deep = '{"a":' * 100_000
    assert backends.recognise(["qemu-storage-daemon", "--export", deep]).sockets == {}  # type: ignore[union-attr]


def test_the_release_of_dpdk() -> None:
    line = "7f00-7f01 r-xp 00000000 fe:01 9 /usr/lib/x86_64-linux-gnu/librte_vhost.so.{}\n"
    for abi, release in DPDK_ABI.items():
        assert backends.version_of(line.format(abi).encode()) == release
    assert backends.version_of(line.format("99.9").encode()) == ""
    assert backends.version_of(b"") == ""


# -- processes, in a tree


def process(box: Box, pid: int, line: str, *, cwd: str = "/", sockets: Sequence[int] = ()) -> None:
    box.file(f"/proc/{pid}/cmdline", line.replace(" ", "\0") + "\0")
    box.at(f"/proc/{pid}/cwd").symlink_to(cwd)
    box.at(f"/proc/{pid}/fd").mkdir()
    for number, inode in enumerate(sockets):
        box.at(f"/proc/{pid}/fd/{number}").symlink_to(f"socket:[{inode}]")


def unix(box: Box, *rows: tuple[int, int, str]) -> None:
    lines = [f"0000000000000000: 00000002 00000000 {flags:08x} 0001 01 {inode} {path}" for inode, flags, path in rows]
    box.file("/proc/net/unix", "\n".join(["Num       RefCount Protocol Flags    Type St Inode Path", *lines, "x", ""]))


def found(box: Box, *sockets: str) -> dict[str, str]:
    views = backends.processes(LiveTree(str(box.root), "box"), sockets)
    return {
        device.facts.get(k.BACKEND_SOCKET) or "": device.facts.get(k.BACKEND_PRODUCT) or ""
        for view in views
        for device in view.devices
    }


def test_processes(tmp_path: Path) -> None:
    box = Box(tmp_path)
    process(box, 10, "dpdk-testpmd --vdev net_vhost0,iface=a.sock", cwd="/run/x")
    process(box, 11, "ovs-vswitchd unix:/run/db", sockets=(5, 6, 7))
    process(box, 12, "ovs-vswitchd unix:/run/db", sockets=(9,))
    process(box, 13, "spdk_tgt -m 1", sockets=(8,))
    process(box, 14, "bash")
    box.file("/proc/self/cmdline", "dpdk-testpmd\0--vdev=net_vhost0,iface=/run/x/a.sock\0")
    unix(box, (6, 0x10000, "/run/o.sock"), (7, 0, "/run/c.sock"), (8, 0x10000, "/run/not asked"))
    assert found(box, "/run/x/a.sock") == {"/run/x/a.sock": "dpdk"}
    assert found(box, "/run/o.sock", "/run/c.sock") == {"/run/o.sock": "ovs-vswitchd"}
    assert found(box, "/run/nothing") == {}
    assert found(box) == {}


# -- back ends and machines


def qemu_view(path: str, more: str = "iommu_platform=on,disable-legacy=on", name: str = "d") -> View:
    line = (
        f"qemu-system-x86_64 -M q35 -nodefaults -chardev socket,id=c,path={path} -netdev vhost-user,id=n,chardev=c "
        f"-device virtio-net-pci,id={name},netdev=n,{more}"
    )
    return qemu.collect(line.split(), Place("command line", "q.txt"))


def back_end(line: str) -> View:
    return backends.collect(line.split(), Place("command line", "b.txt"))


def test_a_back_end_is_a_fact_of_its_device() -> None:
    machine = qemu_view("/run/a")
    kept = scan_backends.fold([back_end("dpdk-testpmd --vdev net_vhost0,iface=/run/a"), machine])
    assert kept == [machine]
    assert machine.devices[0].facts.get(k.BACKEND_PRODUCT) == "dpdk"
    assert machine.source.split("\n") == ["q.txt", "b.txt"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("/run/a", "/run/a", True),
        ("/run/x/../a", "/run/a", True),
        ("a", "/run/a", True),
        ("./a", "/run/a", True),
        ("/run/a", "x/a", False),
        ("/run/aa", "a", False),
        ("/run/a", "/a", False),
        ("a", "b/a", False),
    ],
)
def test_the_same_socket(one: str, other: str, same: bool) -> None:
    for back, front in ((one, other), (other, one)):
        machine = qemu_view(front)
        scan_backends.fold([machine, back_end(f"dpdk-testpmd --vdev net_vhost0,iface={back}")])
        assert (machine.devices[0].facts.get(k.BACKEND_PRODUCT) is not None) is same


def test_one_that_serves_nobody_says_so() -> None:
    kept = scan_backends.fold([qemu_view("/run/b"), back_end("dpdk-testpmd --vdev net_vhost0,iface=/run/a")])
    assert len(kept) == 2
    assert "no device of the machines here is served at /run/a" in kept[1].problems[0]
    assert not kept[1].devices


def test_the_rule_with_and_without() -> None:
    for more, wanted in (("", {"VA205 d"}), (",iommu-support=1", set())):
        line = f"dpdk-testpmd --vdev net_vhost0,iface=/run/a{more}"
        assert said(scan_views([qemu_view("/run/a"), back_end(line)])) == wanted
    plain = qemu_view("/run/a", "disable-legacy=on")
    assert said(scan_views([plain, back_end("dpdk-testpmd --vdev net_vhost0,iface=/run/a")])) == set()


# -- programs that run


@contextlib.contextmanager
def running(words: Sequence[str], path: Path) -> Iterator[int]:
    """A program in a group of its own, once ``path`` is there; ended with all that it started."""
    log = path.with_suffix(".log")
    with log.open("wb") as out:
        child = subprocess.Popen(
            list(words), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, cwd=path.parent
        )
    try:
        end = time.monotonic() + 30
        while not path.exists():
            assert child.poll() is None, log.read_text(errors="replace")[-500:]
            assert time.monotonic() < end, "no socket"
            time.sleep(0.02)
        yield child.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait(10)


def offers(path: Path) -> bool:
    """Bit 33 of what a back end answers to GET_FEATURES."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(path))
        sock.sendall(struct.pack("<III", 1, 1, 0))
        answer = b""
        while len(answer) < 20:
            piece = sock.recv(20 - len(answer))
            assert piece, "closed"
            answer += piece
    return bool(struct.unpack_from("<Q", answer, 12)[0] >> 33 & 1)


def dpdk(path: Path, *, iommu: bool) -> list[str]:
    line = TESTPMD.replace("{prefix}", f"virtiova-{os.getpid()}-{iommu:d}").replace("{socket}", str(path))
    return (line if iommu else line.replace(",iommu-support=1", "")).split()


needs_testpmd = pytest.mark.skipif(not installed("dpdk-testpmd"), reason="n/a: no dpdk-testpmd (apt install dpdk-dev)")
needs_daemon = pytest.mark.skipif(not installed("qemu-storage-daemon"), reason="n/a: no qemu-storage-daemon")
needs_virtiofsd = pytest.mark.skipif(not installed(VIRTIOFSD), reason="n/a: no virtiofsd of QEMU's")


def programs(path: Path) -> dict[str, list[str]]:
    disk = path.with_name("disk")
    disk.write_bytes(bytes(1 << 20))
    export = f"type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={path}"
    blockdev = f"driver=file,node-name=f,filename={disk}"
    return {
        "dpdk 22.11": dpdk(path, iommu=True),
        "dpdk 22.11 without": dpdk(path, iommu=False),
        "qemu-storage-daemon": ["qemu-storage-daemon", "--blockdev", blockdev, "--export", export],
        "virtiofsd of QEMU": [VIRTIOFSD, f"--socket-path={path}", "-o", f"source={path.parent},sandbox=chroot"],
        "virtiova": [sys.executable, "-m", "virtiova", "serve", "blk", str(disk), "--socket-path", str(path)],
    }


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("dpdk 22.11", marks=needs_testpmd),
        pytest.param("dpdk 22.11 without", marks=needs_testpmd),
        pytest.param("qemu-storage-daemon", marks=needs_daemon),
        pytest.param("virtiofsd of QEMU", marks=needs_virtiofsd),
        "virtiova",
    ],
)
def test_what_is_known_of_a_program_is_what_it_answers(name: str, tmp_path: Path) -> None:
    path = tmp_path / "b.sock"
    with running(programs(path)[name], path):
        (view,) = backends.processes(LiveTree(), {str(path)})
        (device,) = view.devices
        told = device.facts.get(k.BACKEND_OFFERED)
        product = device.facts.get(k.BACKEND_PRODUCT) or ""
        assert told is not None
        assert product.startswith(name.removesuffix(" without").partition(".")[0])
        assert offers(path) is told


def scanned(*words: str) -> list[View]:
    return views(parser().parse_args(["scan", *words]), [])


@needs_testpmd
def test_a_running_machine_and_its_back_end(tmp_path: Path) -> None:
    """QEMU takes DPDK with the flag, and refuses it without: the rule says so beforehand."""
    for iommu in (True, False):
        path = tmp_path / f"{iommu:d}.sock"
        line = (
            "qemu-system-x86_64 -M q35,kernel-irqchip=off -accel tcg -m 64 -nodefaults -display none -S "
            "-object memory-backend-memfd,id=m,size=64M,share=on -numa node,memdev=m "
            f"-device intel-iommu,intremap=off,caching-mode=on -chardev socket,id=c,path={path} "
            "-netdev vhost-user,id=n,chardev=c "
            "-device virtio-net-pci,id=d,netdev=n,disable-legacy=on,iommu_platform=on"
        ).split()
        with running(dpdk(path, iommu=iommu), path):
            ready = tmp_path / f"{iommu:d}.qmp"
            if iommu:
                with running([*line, "-qmp", f"unix:{ready},server=on,wait=off"], ready) as pid:
                    time.sleep(0.5)
                    scan = scan_views(scanned("--pid", str(pid)))
            else:
                refused = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
                assert "iommu_platform=true is not supported by the device" in refused.stderr
                found = [qemu.collect(line, AT)]
                scan = scan_views([*found, *backends.processes(LiveTree(), backends.sockets_of(found))])
        assert said(scan) == ({"VA602 d"} if iommu else {"VA205 d"})
        assert [each.backend_offered for each in scan.devices] == [iommu]
