# SPDX-License-Identifier: Apache-2.0
"""What is asked of the kernel's vhost in a guest besides all experiments: as root, with the real files."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any

from virtiova.addr import GPA, IOVA, PAGE_MASK, UVA, Access
from virtiova.cli.main import main
from virtiova.driver.negotiate import driver_ok
from virtiova.errors import NotPossibleError
from virtiova.features import VIRTIO_F_ACCESS_PLATFORM
from virtiova.machine.vhost.device import CallError, VhostFile
from virtiova.machine.vhost.machine import VhostDevice, VhostMachine
from virtiova.machine.vhost.memory import OwnMemory
from virtiova.probe.cell import run_cell
from virtiova.probe.experiment import find
from virtiova.probe.rig import LENGTH, Rig, twin
from virtiova.wire import vhost
from virtiova.wire.vhost import BackendFeature
from virtiova.wire.vhost_user import IotlbKind, IotlbMessage

_BOTH = 1 << 32 | 1 << VIRTIO_F_ACCESS_PLATFORM
_USER = 1000


def _writes(rig: Rig) -> bool:
    """One request; whether it was done, in page A."""
    watched = rig.observe(rig.driver.make_device_write([(rig.data.addr, LENGTH)]), rig.paint_data())
    pages = {witness.page for witness in watched.witnesses if witness.role == "data" and witness.touched}
    rig.driver.queues()[0].ring.poll()
    return watched.done and pages == {"A"}


def asked(path: str) -> dict[str, Any]:
    """What the kernel asks for when: each address once, and again once it was taken back."""
    heard: list[int] = []
    with VhostMachine(VhostDevice(path)) as machine:
        file = machine.front.file

        def listen() -> None:
            real = machine.front.file.asked

            def hear() -> IotlbMessage | None:
                message = real()
                if message is not None:
                    heard.append(message.iova & ~PAGE_MASK)
                return message

            machine.front.file.asked = hear  # type: ignore[method-assign]

        rig = Rig(machine)
        rig.enable_iommu()
        rig.negotiate()
        assert machine.front.file is not file
        listen()
        driver = rig.start()
        first = _writes(rig)
        pages, heard[:] = set(heard), []
        again = _writes(rig)
        second, heard[:] = list(heard), []
        rig.iommu.invalidate()
        _writes(rig)
        untouched, heard[:] = list(heard), []
        rig.iommu.unmap(IOVA(rig.data.addr), rig.ops.page_size)
        rig.ops.map(rig.data)
        rig.iommu.invalidate()
        after = _writes(rig)
        rings = {queue.region.addr & ~PAGE_MASK for queue in driver.queues()}
        return {
            "done": [first, again, after],
            "rings asked for": rings <= pages,
            "data asked for": rig.data.addr in pages,
            "all asked for are ours": pages <= rig.ops.known,
            "second": second,
            "nothing was changed": untouched,
            # Twice, if it was kicked before it had the answer.
            "after": set(heard) == {rig.data.addr},
            "v2": machine.front.file.v2,
        }


def first_form(path: str) -> dict[str, Any]:
    """The same with messages of the first form."""
    cell = run_cell(
        lambda: VhostMachine(VhostDevice(path), wanted=BackendFeature(0)),
        find("device-writes"),
        machine="vhost",
        iommu="iotlb",
        device="vhost",
    )
    return {"observed": cell.observed, "words": cell.evidence.words}


def without_the_bit(path: str) -> dict[str, Any]:
    """A kernel that does not offer bit 33, as older ones do not."""
    real = VhostFile.features
    VhostFile.features = lambda self: real(self) & ~(1 << VIRTIO_F_ACCESS_PLATFORM)  # type: ignore[method-assign]
    try:
        cell = run_cell(
            lambda: VhostMachine(VhostDevice(path)),
            find("device-writes"),
            machine="vhost",
            iommu="iotlb",
            device="vhost",
        )
    finally:
        VhostFile.features = real  # type: ignore[method-assign]
    return {
        "offered": cell.offered,
        "predicted": cell.predicted,
        "observed": cell.observed,
        "words": cell.evidence.words,
    }


def _number(what: Callable[[], object]) -> str:
    try:
        what()
    except CallError as error:
        # It has two names, and either may be in the table.
        return "EOPNOTSUPP" if error.errno == errno.EOPNOTSUPP else errno.errorcode[error.errno]
    return "ok"


def rules(path: str) -> dict[str, Any]:
    """What the kernel takes and refuses, by the names of its errors."""
    memory = OwnMemory()
    try:
        with VhostFile(path, "") as file:
            page = UVA(memory.regions[0].uva)

            def tell(iova: int, size: int, uva: int = page, kind: IotlbKind = IotlbKind.UPDATE) -> str:
                message = IotlbMessage(IOVA(iova), size, UVA(uva), Access.RW, kind)
                return _number(lambda: file.tell(message))

            said: dict[str, Any] = {"memory before owner": _number(lambda: file.set_memory(memory.table))}
            file.own()
            said["own twice"] = _number(file.own)
            said["not offered"] = _number(lambda: file.set_features(1 << 34))
            said["update without 33"] = tell(0x1000, 0x1000)
            file.set_features(_BOTH)
            said["update"] = tell(0x1000, 0x1000)
            said["of nothing"] = tell(0x1000, 0)
            said["the last page"] = tell(2**64 - 0x1000, 0x1000)
            said["beyond it"] = tell(2**64 - 0x1000, 0x2000)
            said["to the kernel's memory"] = tell(0x1000, 0x1000, 0xFFFF_8880_0000_0000)
            said["all taken back"] = [tell(base, 1 << 63, 0, IotlbKind.INVALIDATE) for base in (0, 1 << 63)]
            file.set_features(1 << 32)
            said["update after 33 was given up"] = tell(0x1000, 0x1000)
            said["largest ring"] = [
                _number(lambda size=size: file.call("", vhost.SET_VRING_NUM, vhost.vring_state(0, size)))  # type: ignore[misc]
                for size in (32768, 65536)
            ]
            said["queue 2"] = _number(lambda: file.ring_base(2))
            reset = bytearray(8)
            said["reset owner"] = _number(lambda: file.call("RESET_OWNER", vhost.RESET_OWNER, reset))
            said["owned again"] = _number(file.own)
            said["update after that"] = tell(0x1000, 0x1000)
            return said
    finally:
        memory.close()


def given_up(path: str) -> dict[str, Any]:
    """Bit 33 taken, and then not, on one and the same file."""
    with VhostMachine(VhostDevice(path)) as machine:
        rig = Rig(machine)
        rig.enable_iommu()
        rig.negotiate()
        file = machine.front.file
        machine.front.renew = lambda: None  # type: ignore[method-assign]
        rig.negotiate(take=False)
        assert machine.front.file is file
        try:
            rig.start()
        except CallError as error:
            return {"start": errno.errorcode[error.errno]}
        return {"start": "ok", "wrote": _writes(rig)}


def rings_for_reading(path: str) -> dict[str, Any]:
    """Rings that the device may read and not write, of which nothing is asked but to start."""
    asked: list[tuple[bool, int]] = []
    with VhostMachine(VhostDevice(path)) as machine:
        rig = Rig(machine)
        rig.enable_iommu()
        rig.negotiate()
        driver = rig.start(ok=False)
        resolve = machine.front.resolve

        def noted(iova: int, access: Access) -> tuple[IOVA, GPA, Access] | None:
            asked.append((iova == driver.queues()[0].ring.parts[2], access.value))
            return resolve(iova, access)

        machine.front.resolve = noted
        queue = driver.queues()[0]
        used = queue.ring.parts[2] - queue.region.addr
        rig.iommu.unmap(IOVA(queue.region.addr), rig.ops.page_size)
        rig.ops.map(twin(queue.region), Access.READ)
        home = GPA(twin(queue.region).homes["A"].gpas[0] + used)
        machine.ram.write(home, b"flag")
        driver_ok(rig.transport)
        queue.kick()
        machine.wait(lambda: False, 0.1)
        faults = [fault.reason for fault in machine.iommu.faults()]
        return {"asked first": asked[0], "used ring": machine.ram.read(home, 4).hex(), "faults": faults}


def header(path: str) -> dict[str, Any]:
    """The last two bytes of the header that stands before a received frame: the number of its buffers."""
    with VhostMachine(VhostDevice(path)) as machine:
        rig = Rig(machine)
        rig.enable_iommu()
        rig.negotiate()
        rig.start()
        rig.observe(rig.driver.make_device_write([(rig.data.addr, LENGTH)]), rig.paint_data())
        painted = rig.data.read(0, 16)
        return {"buffers": painted[10:12].hex(), "before": painted[:10].hex(), "frame": painted[12:].hex()}


def left(path: str) -> dict[str, Any]:
    """What a machine leaves behind."""

    def threads() -> int:
        """The kernel's workers: processes of its own, and since Linux 6.4 threads of ours."""
        count = 0
        for name in (*glob.glob("/proc/[0-9]*/comm"), *glob.glob("/proc/self/task/*/comm")):
            with contextlib.suppress(OSError), open(name, encoding="ascii") as file:
                count += file.read().startswith("vhost-")
        return count

    def now() -> list[Any]:
        with open("/proc/net/dev", encoding="ascii") as file:
            interfaces = sorted(line.split(":")[0].strip() for line in file if ":" in line)
        return [len(os.listdir("/proc/self/fd")), threads(), interfaces]

    before = now()
    with VhostMachine(VhostDevice(path)) as machine:
        rig = Rig(machine)
        rig.enable_iommu()
        rig.negotiate()
        rig.start()
        assert _writes(rig)
        during = now()
    machine.close()
    return {"before": before, "during": during, "after": now()}


@contextlib.contextmanager
def _somebody() -> Iterator[None]:
    os.seteuid(_USER)
    try:
        yield
    finally:
        os.seteuid(0)


def denied(path: str) -> dict[str, Any]:
    """A user who may not open the file, and one who may, but has no right to a network of his own."""
    with _somebody():
        code = main(["probe", "vhost", path])
    mode = stat.S_IMODE(os.stat(path).st_mode)
    os.chmod(path, 0o666)
    said = ""
    try:
        with _somebody():
            VhostMachine(VhostDevice(path)).close()
    except NotPossibleError as reason:
        said = str(reason)
    finally:
        os.chmod(path, mode)
    return {"code": code, "may open": said}
