# SPDX-License-Identifier: Apache-2.0
"""Which devices a command line makes, in the order in which QEMU makes them: that is the order of their places."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from virtiova.collect.qemu.keyvals import pairs
from virtiova.collect.qemu.machines import Family
from virtiova.collect.qemu.models import DISPLAYS
from virtiova.collect.qemu.options import CommandLine, Option

_VGA: Final = {
    "std": "VGA", "cirrus": "cirrus-vga", "vmware": "vmware-svga", "qxl": "qxl-vga", "virtio": "virtio-vga",
}  # fmt: skip
_DRIVES: Final = ("hda", "hdb", "hdc", "hdd", "cdrom")
_SOUND: Final = {"hda": "intel-hda", "ac97": "AC97", "es1370": "ES1370", "virtio": "virtio-sound-pci"}
"""What -audio and -soundhw bring, where it is a PCI function."""
_NICS: Final = frozenset({"e1000", "e1000e", "rtl8139", "ne2k_pci", "pcnet", "tulip", "vmxnet3", "igb", "i82551",
                          "i82557b", "i82559er", "sungem", "sunhme"})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Made:
    """A device that is made: its model, and the option that says so; None: it comes by default."""

    driver: str
    option: Option | None
    text: str = ""
    """What makes it, where it is no option."""

    def get(self, key: str) -> str:
        """What its option says of a key."""
        return self.option.get(key) if self.option is not None else ""


def made(line: CommandLine, family: Family | None, arch: str) -> Iterator[Made]:
    """The machine's own, then ``-device`` and what stands for it, then ``-drive if=virtio``, then JSON."""
    if family is not None:
        yield from _by_machine(line, family)
    written: list[Made] = []
    later: list[Made] = []
    for option in line.options:
        match option.name:
            case "device":
                (later if option.json else written).append(Made(option.get("driver"), option))
                if option.get("driver") == "amd-iommu":
                    # It brings a PCI function of its own along, which takes the next slot.
                    (later if option.json else written).append(Made("AMDVI-PCI", None, "amd-iommu's own function"))
            case "virtfs":
                written.append(Made("virtio-9p", _bare(option)))
            case "balloon" if option.text.split(",")[0] == "virtio":
                keys = pairs(option.text.partition(",")[2])
                written.append(Made("virtio-balloon", Option("balloon", option.text, option.line, option.source, keys)))
            case "watchdog":
                written.append(Made(option.text, option))
            case "virtioconsole":
                written.append(Made("virtio-serial", _bare(option)))
    yield from _sound(line)
    yield from written
    yield from (each for option in line.options if (each := _drive(option, family)) is not None)
    yield from later


def _bare(option: Option) -> Option:
    """An option that makes a device, but says nothing of it: its keys are those of something else."""
    return Option(option.name, option.text, option.line, option.source)


def _sound(line: CommandLine) -> Iterator[Made]:
    """Sound comes before any other device."""
    named = [(option, option.get("model")) for option in line.all("audio")]
    named += [(option, name) for option in line.all("soundhw") for name in option.text.split(",")]
    for option, model in named:
        if model in _SOUND:
            yield Made(_SOUND[model], _bare(option))


def _drive(option: Option, family: Family | None) -> Made | None:
    """A drive that brings its own virtio-blk."""
    virtio = family is not None and family.virtio_drives
    if option.name == "drive":
        kind = option.get("if")
        if kind == "virtio" or (not kind and virtio):
            return Made("virtio-blk", _bare(option))
    elif option.name in _DRIVES and virtio:
        return Made("virtio-blk", _bare(option))
    return None


def _by_machine(line: CommandLine, family: Family) -> Iterator[Made]:
    """What the machine makes before any ``-device``: display, network, in its order."""
    defaults = line.last("nodefaults") is None
    vga = _vga(line, family, defaults=defaults)
    nics = list(_nics(line, family, defaults=defaults))
    for kind in family.order:
        if kind == "vga" and vga:
            option = line.last("vga")
            yield Made(vga, None, str(option) if option is not None else "the machine's default display")
        elif kind == "nic":
            yield from nics
        elif kind == "usb" and (line.last("usb") is not None or (defaults and (vga or _own_display(line)))):
            yield Made("nec-usb-xhci", None, "the machine's default USB")


def _vga(line: CommandLine, family: Family, *, defaults: bool) -> str:
    if "vga" not in family.order or not family.root:
        return ""
    said = line.last("vga")
    if said is not None:
        return _VGA.get(said.text.partition(",")[0], "")
    return family.vga if defaults and not _own_display(line) else ""


def _own_display(line: CommandLine) -> bool:
    """Is a display named among the devices, and none by -vga?"""
    named = any(each.get("driver") in DISPLAYS for each in line.all("device", "global"))
    return named and line.last("vga") is None


def _nics(line: CommandLine, family: Family, *, defaults: bool) -> Iterator[Made]:
    said = line.all("nic", "net")
    for option in said:
        kind = option.get("type")
        if kind == "none" or (option.name == "net" and kind != "nic"):
            continue
        model = option.get("model") or family.nic
        if model in ("virtio", "virtio-net"):
            model = "virtio-net"
        elif model not in _NICS and not model.startswith("virtio-net"):
            continue
        keys = [(key, value) for key, value in option.pairs if key not in ("type", "model", "id", "bus")]
        yield Made(model, Option(option.name, option.text, option.line, option.source, keys))
    if not said and defaults and family.nic and not line.all("netdev"):
        yield Made(family.nic, None, "the machine's default network device")
