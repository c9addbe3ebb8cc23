# SPDX-License-Identifier: Apache-2.0
"""The checks of an address space: each a sentence, what it rests on, and histories that would break it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from hypothesis.strategies import SearchStrategy

from virtiova.addr import PAGE_SIZE
from virtiova.errors import UsageError
from virtiova.testing import space_strategies as histories
from virtiova.testing.checks import EXAMPLES, Check, Effort, Report, choose, run, search_histories
from virtiova.testing.memory import Memory
from virtiova.testing.space_play import Play
from virtiova.testing.space_strategies import Histories, Terrain, iotlb_histories
from virtiova.testing.spaces import History, Space

_BIT: Final = "virtio 1.4, 6.1"
_IOTLB: Final = "vhost-user protocol, IOMMU support"
_OURS: Final = "virtiova, AddressSpace"


@dataclass(frozen=True, slots=True)
class _Row:
    name: str
    title: str
    citation: str
    histories: Histories
    where: bool = False
    """Whether a refusal has to name the right byte."""


_ROWS: Final = (
    _Row("moves", "what is mapped is read and written where it lies", _BIT, histories.one_mapping),
    _Row("unmapped", "what is not mapped is refused, also where there is RAM", _BIT, histories.nothing_mapped),
    _Row("permission", "a read needs permission to read, a write to write", _IOTLB, histories.permissions),
    _Row("mixed", "every part of an access needs its permission", _IOTLB, histories.mixed_permissions),
    _Row("upgrade", "an update that changes permission alone counts at once", _IOTLB, histories.changed_permission),
    _Row("neighbours", "adjacent IOVAs may lead to memory that is not", _BIT, histories.neighbours),
    _Row("blocks", "a mapping may lead over two blocks of RAM", _OURS, histories.blocks_of_ram),
    _Row("aliases", "two IOVAs of one page live and die apart", _IOTLB, histories.aliases),
    _Row(
        "replaces", "an update takes the place of what it overlaps, and no more", _IOTLB, histories.updates_over_updates
    ),
    _Row("invalidate", "what was invalidated is used no more, the rest as before", _IOTLB, histories.taken_back),
    _Row("invalidate-all", "all can be invalidated, at once or in two parts", _IOTLB, histories.all_taken_back),
    _Row("top", "a mapping may end with the last byte of the space", _IOTLB, histories.top_of_the_space),
    _Row("wrap", "an access past the last byte does not go on at 0", _OURS, histories.around_the_end),
    _Row("miss", "a refusal names the first byte that is missing, and for what", _IOTLB, histories.partly_mapped, True),
    _Row("all-or-nothing", "an access that misses anywhere moves no byte", _OURS, histories.partly_mapped),
    _Row("nothing", "no bytes can be moved from and to anywhere", _OURS, histories.nothing_at_all),
    _Row("bounded", "a length that nothing is behind is refused at once", _OURS, histories.far_too_much),
    _Row("sized", "single loads and stores obey the same rules, and alignment", _OURS, histories.sized_accesses),
    _Row("translate", "look-ups say the same as accesses", _OURS, histories.look_ups),
)


def address_space_checks(
    make: Callable[[Memory], Space],
    *,
    granule: int = PAGE_SIZE,
    width: int = 64,
    forgets: bool = False,
    examples: int = EXAMPLES,
    seed: int = 0,
) -> list[Check]:
    """The checks of `check_address_space`, one by one: for ``pytest.mark.parametrize("check", ..., ids=str)``."""
    if granule not in {1 << bit for bit in range(4, 13)}:
        raise UsageError(f"a granule of {granule} bytes, wanted a power of two from 16 to {PAGE_SIZE}")
    if not 32 <= width <= 64:
        raise UsageError(f"addresses of {width} bits, wanted 32 to 64")
    terrain, effort = Terrain(granule, width), Effort(examples, seed)

    def body(made: Histories, *, where: bool) -> Callable[[], None]:
        def play(history: History) -> None:
            Play(make, granule, width, where=where, forgets=forgets)(history)

        return lambda: search_histories(made(terrain), play, effort)

    def anything(terrain: Terrain) -> SearchStrategy[History]:
        full = getattr(make(Memory()), "space", None) is not None
        return iotlb_histories(terrain.granule, terrain.width, full=full)

    checks = [Check(row.name, row.title, row.citation, body(row.histories, where=row.where)) for row in _ROWS]
    whole = body(anything, where=True)
    return [*checks, Check("any-history", "any history comes to what it comes to in the model", _IOTLB, whole)]


def check_address_space(
    make: Callable[[Memory], Space],
    *,
    granule: int = PAGE_SIZE,
    width: int = 64,
    forgets: bool = False,
    only: Iterable[str] | None = None,
    expected: Mapping[str, str] | None = None,
    examples: int = EXAMPLES,
    seed: int = 0,
) -> Report:
    """Check an address space against a plain model.

    ``make`` gives a new one, empty, over the RAM of a `Memory`: a `Space`, or what `behind` makes of one of
    virtiova's. ``granule``: the smallest piece that can be mapped, in bytes, a power of two from 16 to 4096.
    ``width``: bits of an IOVA, 32 to 64. ``forgets``: it is a cache that may lose mappings; what it refuses is then
    given once more, and has to do. ``only``: names of checks; all if None. ``expected``: names of checks that fail, and
    why: they must. ``examples``: histories for each check, ``seed``: other ones.

    Returns what was checked. Raises `CheckFailed` with the shortest history for each check that fails, `UsageError` for
    a name or a number that there is not.
    """
    checks = address_space_checks(make, granule=granule, width=width, forgets=forgets, examples=examples, seed=seed)
    return run("check_address_space", choose(checks, only), expected or {})
