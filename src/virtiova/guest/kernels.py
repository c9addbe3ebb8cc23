# SPDX-License-Identifier: Apache-2.0
"""What is taken out of a kernel's package: the image, and the modules that virtio disks need, in loading order."""

from __future__ import annotations

import lzma
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from virtiova.errors import NotPossibleError, ProtocolError

WANTED: Final = ("virtio_pci", "virtio_mmio", "virtio_blk")
_XZ: Final = b"\xfd7zXZ\0"
_ELF: Final = b"\x7fELF"
_SECTORS_AT: Final = 0x1F1
_HEADER_AT: Final = 0x202
_PAYLOAD_AT: Final = 0x248
"""``setup_sects``, ``header`` and ``payload_offset`` of an x86 image (Linux, Documentation/x86/boot.rst)."""
_IMAGE_LIMIT: Final = 512 << 20
_MODULE_LIMIT: Final = 64 << 20
_DEPENDS: Final = re.compile(rb"\0depends=([A-Za-z0-9_,-]*)\0")


def unpack_xz(data: bytes, limit: int) -> bytes:
    """One xz stream, whatever comes after it, and at most ``limit`` bytes of content."""
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ)
    try:
        content = decompressor.decompress(data, limit)
    except lzma.LZMAError as error:
        raise ProtocolError(f"not a whole xz stream: {error}") from error
    if not decompressor.eof:
        raise ProtocolError(f"an xz stream that is cut off, or holds more than 0x{limit:x} bytes")
    return content


def uncompressed(image: bytes) -> bytes:
    """The ELF ``vmlinux`` inside of an x86 kernel image that is packed with xz; any other image as it is.

    An emulated processor takes 3.5 s to unpack it; here it takes one second, once. (Debian's cloud kernel is packed
    with lz4, which costs the guest nothing worth saving.)
    """
    if len(image) < _PAYLOAD_AT + 8 or image[_HEADER_AT : _HEADER_AT + 4] != b"HdrS":
        return image
    offset, length = struct.unpack_from("<II", image, _PAYLOAD_AT)
    start = (image[_SECTORS_AT] + 1) * 512 + offset
    payload = image[start : start + length]
    if not payload.startswith(_XZ):
        return image
    content = unpack_xz(payload, _IMAGE_LIMIT)
    return content if content.startswith(_ELF) else image


def module_name(file: str) -> str:
    """``virtio-rng.ko.xz`` is the module ``virtio_rng``."""
    return re.sub(r"\.ko(\.xz)?$", "", file.rpartition("/")[2]).replace("-", "_")


def read_module(path: Path) -> bytes:
    """A module's bytes, unpacked."""
    data = path.read_bytes()
    return unpack_xz(data, _MODULE_LIMIT) if path.suffix == ".xz" else data


def depends(module: bytes) -> list[str]:
    """The modules that a module says it needs, from its ``.modinfo``."""
    match = _DEPENDS.search(module)
    return [name.replace("-", "_") for name in match[1].decode().split(",") if name] if match else []


def parse_dep(text: str) -> dict[str, list[str]]:
    """``modules.dep``: a module's name to the names that it needs, all levels of them."""
    needs: dict[str, list[str]] = {}
    for line in text.splitlines():
        file, colon, rest = line.partition(":")
        if colon and file.strip():
            needs[module_name(file.strip())] = [module_name(item) for item in rest.split()]
    return needs


def closure(wanted: Iterable[str], needs: Mapping[str, Iterable[str]], builtin: Iterable[str] = ()) -> list[str]:
    """All modules that ``wanted`` come to, each after those it needs. What is built in needs no loading.

    Raises `NotPossibleError` for a module that a needed one names and that is not there, and for a circle.
    """
    inside = set(builtin)
    order: list[str] = []
    pending: list[str] = []

    def visit(name: str) -> None:
        if name in order or name in inside:
            return
        if name in pending:
            raise NotPossibleError(f"modules that need each other: {' > '.join([*pending, name])}")
        if name not in needs:
            raise NotPossibleError(f"the kernel package has no module {name}")
        pending.append(name)
        for other in needs[name]:
            visit(other)
        pending.pop()
        order.append(name)

    for name in wanted:
        visit(name)
    return order


def pick(root: Path, wanted: Iterable[str] = WANTED) -> dict[str, bytes]:
    """From an unpacked kernel package: ``kernel``, ``modules/NAME.ko`` and ``order``.

    A wanted module that the kernel does not have at all is left out: s390x has no virtio-mmio.
    """
    images = sorted((root / "boot").glob("vmlinu[xz]-*"))
    trees = sorted((root / "lib/modules").glob("*")) or sorted((root / "usr/lib/modules").glob("*"))
    if len(images) != 1 or len(trees) != 1:
        raise NotPossibleError(f"the kernel package holds {len(images)} images and {len(trees)} module trees")
    tree = trees[0]
    paths = {module_name(path.name): path for path in tree.rglob("*.ko*")}
    builtin_list = tree / "modules.builtin"
    listed = builtin_list.read_text(encoding="utf-8") if builtin_list.is_file() else ""
    builtin = {module_name(line) for line in listed.splitlines()}
    needs = _needs(tree, paths, wanted)
    order = closure([name for name in wanted if name in paths], needs, builtin)
    files = {"kernel": uncompressed(images[0].read_bytes()), "order": "\n".join(order).encode()}
    files.update({f"modules/{name}.ko": read_module(paths[name]) for name in order})
    return files


def _needs(tree: Path, paths: Mapping[str, Path], wanted: Iterable[str]) -> dict[str, list[str]]:
    """Who needs whom. Debian's packages come without ``modules.dep`` (it is made at installation), so that the
    modules themselves are asked; where there is one, it is taken."""
    made = tree / "modules.dep"
    if made.is_file():
        return parse_dep(made.read_text(encoding="utf-8"))
    needs: dict[str, list[str]] = {}
    pending = [name for name in wanted if name in paths]
    while pending:
        name = pending.pop()
        if name not in needs:
            needs[name] = depends(read_module(paths[name]))
            pending += [other for other in needs[name] if other in paths]
    return needs
