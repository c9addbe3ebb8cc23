# SPDX-License-Identifier: Apache-2.0
"""The options of ``virtiova probe``: light, since every start of the program reads them."""

from __future__ import annotations

import argparse

from virtiova.cli.parsing import Commands, Once, Parser, common


def add(commands: Commands) -> None:
    """The command, and its targets."""
    probe = commands.add_parser(
        "probe",
        help="see on a real device where its bytes land",
        description="Drive a real device with two pages, one where the IOMMU points and one where the bare address "
        "points, and look at which of them it touched. Without a target: the default table.",
        epilog="Each target has options of its own, such as --device and --experiment: virtiova probe qemu --help",
    )
    _output(probe)
    probe.add_argument("--list", action="store_true", help="list machines, IOMMUs, devices, places and experiments")
    targets = probe.add_subparsers(dest="target", metavar="TARGET", parser_class=Parser)
    for target in (
        _qemu(targets),
        _model(targets),
        _vhost_user(targets),
        _vfio(targets),
        _vhost(targets),
        _vdpa(targets),
    ):
        target.add_argument(
            "--experiment",
            action="append",
            metavar="NAME",
            help="run this one only (may be repeated; default: all)",
        )
        target.add_argument(
            "--ring",
            action=Once,
            default="split",
            metavar="NAME",
            help="split, or packed: as packed=on of a device of QEMU (default: %(default)s)",
        )
        _output(target, inherit=True)


def _qemu(targets: Commands) -> Parser:
    qemu = targets.add_parser("qemu", help="a device of QEMU", description="Probe a device of QEMU.")
    qemu.add_argument(
        "--machine",
        action=Once,
        default="q35",
        metavar="NAME",
        help="machine type: q35, virt, virt-mmio, sun4u, pseries, riscv-virt (default: %(default)s)",
    )
    qemu.add_argument(
        "--iommu",
        action=Once,
        metavar="NAME",
        help="one that the machine can have (see probe --list), with [,option=value...] (default: the machine's own; "
        "q35: intel)",
    )
    qemu.add_argument(
        "--device",
        action="append",
        required=True,
        metavar="SPEC",
        help="as for QEMU: 'virtio-blk-pci,iommu_platform=on'; place=root-port, root-bus or bypass says where it goes. "
        "May be repeated: several devices in one machine",
    )
    qemu.add_argument(
        "--interface",
        action=Once,
        default="auto",
        metavar="NAME",
        help="of a transitional device: auto, modern or legacy (default: %(default)s)",
    )
    qemu.add_argument(
        "--qemu",
        action=Once,
        metavar="WHICH",
        help="another QEMU than this machine's: a directory with the binaries, or a suite of Debian to fetch it from",
    )
    qemu.add_argument("--offline", action="store_true", help="fetch no packages for --qemu")
    qemu.add_argument(
        "--backend",
        action=Once,
        metavar="COMMAND",
        help="what serves a vhost-user-*-pci device: started for each cell; {socket} is where it is to listen, {image} "
        "the path of a disk image of ours, {net} the number of a datagram socket",
    )
    return qemu


def _model(targets: Commands) -> Parser:
    model = targets.add_parser(
        "model",
        help="a device of the in-process machine",
        description="Probe a device of the in-process machine.",
    )
    model.add_argument("behaviour", help="honest, quirky, lying or stale")
    model.add_argument(
        "--device", action=Once, default="blk", metavar="KIND", help="blk, console, net or rng (default: %(default)s)"
    )
    model.add_argument(
        "--iommu", action=Once, default="soft", metavar="NAME", help="soft or none (default: %(default)s)"
    )
    return model


def _vhost_user(targets: Commands) -> Parser:
    target = targets.add_parser(
        "vhost-user",
        help="a vhost-user back end",
        description="Probe a vhost-user back end: our own front end is the machine and the IOMMU.",
    )
    target.add_argument("socket", nargs="?", metavar="SOCKET", help="where a back end listens; one cell at a time")
    target.add_argument(
        "--spawn",
        action=Once,
        metavar="COMMAND",
        help="start the back end for each cell instead: {socket} is where it is to listen, or {fd} the number of its "
        "connected socket; {image} is the path of a disk image of ours, {share} of a directory, {net} the number of a "
        "datagram socket",
    )
    target.add_argument(
        "--type",
        action=Once,
        metavar="KIND",
        help="blk, console, fs, net or rng (default: guessed, which the output says)",
    )
    target.add_argument(
        "--write", action="store_true", help="allow writes to its disk, in the upper half; they are put back"
    )
    target.add_argument(
        "--conformance",
        action="store_true",
        help="ask the conformance cases instead: what every back end behind an IOMMU has to do",
    )
    target.add_argument(
        "--case",
        action="append",
        metavar="ID",
        help="of these, ask this one only (may be repeated; default: all)",
    )
    target.add_argument(
        "--echo", action="store_true", help="its network sends back each frame that it is given (testpmd's io mode)"
    )
    return target


def _vfio(targets: Commands) -> Parser:
    target = targets.add_parser(
        "vfio",
        help="a device that is bound to vfio-pci",
        description="Probe a virtio device of this machine, behind its IOMMU. Binding it is left to you: the command "
        "is printed.",
    )
    target.add_argument("address", metavar="ADDRESS", help="PCI address, such as 0000:03:00.0")
    target.add_argument(
        "--i-know",
        action="store_true",
        help="let a device loose that does not offer bit 33, and so reaches all of memory",
    )
    target.add_argument(
        "--write", action="store_true", help="allow writes to its disk, in the upper half; they are put back"
    )
    target.add_argument("--echo", action="store_true", help="its network sends back each frame that it is given")
    return target


def _vhost(targets: Commands) -> Parser:
    target = targets.add_parser(
        "vhost",
        help="a back end of this machine's kernel: /dev/vhost-net, /dev/vhost-vsock",
        description="Probe a back end of this machine's kernel, as its front end. The network or the connections "
        "behind it are ours, and nobody else sees them.",
    )
    target.add_argument("path", metavar="PATH", help="/dev/vhost-net or /dev/vhost-vsock")
    return target


def _vdpa(targets: Commands) -> Parser:
    target = targets.add_parser(
        "vdpa",
        help="a vDPA device of this machine",
        description="Probe a vDPA device, in hardware or in user space (VDUSE), that vhost_vdpa hands over. Making and "
        "binding it is left to you: the command is printed.",
    )
    target.add_argument("path", metavar="PATH", help="its file, such as /dev/vhost-vdpa-0")
    target.add_argument(
        "--write", action="store_true", help="allow writes to its disk, in the upper half; they are put back"
    )
    target.add_argument("--echo", action="store_true", help="its network sends back each frame that it is given")
    return target


def _output(probe: argparse.ArgumentParser, *, inherit: bool = False) -> None:
    """Options of every probe. A sub-command's absent option must not undo what was said before it."""
    no = argparse.SUPPRESS if inherit else False
    probe.add_argument("-j", "--json", action="store_true", default=no, help="JSON on standard output")
    probe.add_argument(
        "-o",
        "--output",
        # A sub-command's list does not replace the one before it.
        dest="more_output" if inherit else "output",
        action="append",
        metavar="FILE",
        help="write FILE as well; its suffix, .json or .txt, is the format; of conformance cases also .sarif or .xml",
    )
    probe.add_argument("-q", "--quiet", action="store_true", default=no, help="no table; the exit status says it")
    probe.add_argument(
        "-v", "--verbose", action="store_true", default=no, help="with the chain of reasons for each cell"
    )
    probe.add_argument("--script", action="store_true", default=no, help="print the Python that does the same")
    common(probe, inherit=inherit)
