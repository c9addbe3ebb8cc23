# SPDX-License-Identifier: Apache-2.0
"""QEMU's options: which there are, which take an argument, and the words of a command line as a list of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from virtiova.collect.qemu.keyvals import Pairs, from_json, pairs, sections
from virtiova.collect.qemu.words import LIMIT, command_of, line_of
from virtiova.errors import ProtocolError

Reader = Callable[[str], bytes | None]
"""Reads a file that a command line names; None if it may not, or cannot."""

_BARE_NAMES: Final = """
    h help version snapshot no-fd-bootchk no-acpi no-hpet nographic portrait full-screen alt-grab ctrl-grab
    no-frame no-quit win2k-hack usb mem-prealloc S s singlestep one-insn-per-tb preconfig enable-kvm no-reboot
    no-shutdown daemonize only-migratable nodefaults nodefconfig no-user-config xen-attach xen-domid-restrict
    async-teardown enable-sync-profile audio-help enable-fips semihosting no-kvm no-kvm-irqchip no-kvm-pit
    no-kvm-pit-reinjection old-param enable-hax
"""
_BARE: Final = frozenset(_BARE_NAMES.split())
"""Options without an argument, also those of older versions."""
_WITH_NAMES: Final = """
    machine M cpu accel smp numa add-fd set global boot m mem-path k audio audiodev device name uuid fda fdb hda
    hdb hdc hdd cdrom blockdev drive mtdblock sd fsdev virtfs iscsi usbdevice display spice rotate vga g vnc
    acpitable smbios netdev nic net chardev tpmdev bios pflash kernel append initrd dtb shim compat fw_cfg serial
    parallel monitor qmp qmp-pretty mon debugcon pidfile overcommit gdb d D dfilter seed L xen-domid action loadvm
    option-rom rtc icount watchdog watchdog-action echr incoming chroot runas run-with sandbox readconfig trace
    plugin msg dump-vmstate object prom-env semihosting-config realtime balloon soundhw tb-size writeconfig
    virtioconsole qtest qtest-log bt hax-vm redir smb tftp bootp clock hdachs kvm-shadow-memory
"""
_WITH: Final = frozenset(_WITH_NAMES.split())
_SHORT: Final = {"M": "machine"}

_FIRST: Final = {
    "device": "driver", "netdev": "type", "nic": "type", "net": "type", "chardev": "backend", "object": "qom-type",
    "fsdev": "fsdriver", "virtfs": "fsdriver", "machine": "type", "accel": "accel", "name": "guest", "m": "size",
    "blockdev": "driver", "audio": "driver",
}  # fmt: skip
"""Options that are made of keys and values, and the key of a first item that names none."""
KEYED: Final = frozenset({*_FIRST, "drive", "global", "smbios"})
_JSON: Final = frozenset({"device", "netdev", "object", "blockdev", "machine"})
_CONFIG: Final = 1 << 20


@dataclass(slots=True)
class Option:
    """One option: its name without dashes, what was said, and where. ``pairs`` where it has keys and values."""

    name: str
    text: str
    line: int = 0
    source: str = ""
    """The file of ``-readconfig`` that has it; empty: the command line itself."""
    pairs: Pairs = field(default_factory=list)
    json: bool = False

    def get(self, key: str, default: str = "") -> str:
        """The last value of a key."""
        return next((value for name, value in reversed(self.pairs) if name == key), default)

    def __contains__(self, key: str) -> bool:
        return any(name == key for name, _ in self.pairs)

    def __str__(self) -> str:
        return f"-{self.name} {self.text}".strip()


@dataclass(slots=True)
class CommandLine:
    """A QEMU command line, option by option. ``binary`` is empty where it begins with an option."""

    binary: str
    options: list[Option] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def all(self, *names: str) -> list[Option]:
        """The options of these names, in their order."""
        return [option for option in self.options if option.name in names]

    def last(self, name: str) -> Option | None:
        """The last of that name, which is the one that counts."""
        return next((option for option in reversed(self.options) if option.name == name), None)


def parse(words: Sequence[str], read: Reader | None = None) -> CommandLine:
    """All options of a command line, those of ``-readconfig`` files in their place, and ``-set`` applied.

    `UsageError` if there is no QEMU in it, `ProtocolError` if an option is beyond what any QEMU takes.
    """
    clean = [_clean(word) for word in command_of(words)]
    if sum(map(len, clean)) > LIMIT:
        raise ProtocolError(f"more than {LIMIT} characters are no command line")
    line = CommandLine("" if not clean or clean[0].startswith("-") else clean[0])
    lines = [line_of(word) for word in command_of(words)]
    at = 1 if line.binary else 0
    while at < len(clean):
        word, number = clean[at], lines[at]
        at += 1
        if not word.startswith("-") or word == "-":
            line.options.append(Option("hda", word, number))
            continue
        name = word[2:] if word.startswith("--") else word[1:]
        argument = ""
        if name not in _BARE:
            known = name in _WITH
            if at < len(clean) and (known or not clean[at].startswith("-")):
                argument = clean[at]
                at += 1
            elif known:
                line.problems.append(f"{word}: its argument is missing")
            if not known:
                line.unknown.append(f"{word} {argument}".strip())
                continue
        _add(line, _SHORT.get(name, name), argument, number, read)
    _apply_set(line)
    return line


def _clean(word: str) -> str:
    """Bytes that are no text come as lone surrogates, which nothing could print; a NUL ends a word."""
    return word.partition("\0")[0].encode("utf-8", "replace").decode() if not word.isascii() or "\0" in word else word


def _add(line: CommandLine, name: str, text: str, number: int, read: Reader | None) -> None:
    if name == "readconfig":
        _read_config(line, text, read)
        return
    option = Option(name, text, number)
    if name in _JSON and text.startswith("{"):
        option.pairs, option.json = from_json(text, name), True
    elif name == "global":
        option.pairs = _global(text)
    elif name in KEYED:
        option.pairs = pairs(text, _FIRST.get(name, ""))
    line.options.append(option)


def _global(text: str) -> Pairs:
    """``driver.prop=value``, or the same with three keys; the first dot divides, since no driver's name has one."""
    driver, dot, rest = text.partition(".")
    prop, equals, value = rest.partition("=")
    if dot and equals and "=" not in driver and "," not in driver:
        return [("driver", driver), ("property", prop), ("value", value)]
    return pairs(text)


def _read_config(line: CommandLine, name: str, read: Reader | None) -> None:
    data = read(name) if read is not None else None
    if data is None:
        line.problems.append(f"-readconfig {name}: what it says is not known here")
        return
    if len(data) > _CONFIG:
        raise ProtocolError(f"-readconfig {name}: more than {_CONFIG} bytes")
    for group, identity, entries, number in sections(data, name):
        keys = [("id", identity), *entries] if identity else entries
        if group in _BARE or group in _WITH:
            line.options.append(Option(group, " ".join(f"{k}={v}" for k, v in keys), number, name, keys))
        else:
            line.unknown.append(f"[{group}] of {name}")


def _apply_set(line: CommandLine) -> None:
    """``-set group.id.key=value`` changes an option that has that id; of those in JSON it knows nothing."""
    wanted = line.all("set")
    if not wanted:
        return
    known = {(option.name, option.get("id")): option for option in line.options if option.pairs and not option.json}
    for each in wanted:
        where, _, value = each.text.partition("=")
        group, _, rest = where.partition(".")
        identity, _, key = rest.partition(".")
        option = known.get((group, identity))
        if option is None or not key:
            line.problems.append(f"{each}: nothing of that group and id")
            continue
        option.pairs.append((key, value))
