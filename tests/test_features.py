# SPDX-License-Identifier: Apache-2.0
"""Which bits a driver keeps of an offer, and which addresses it then passes, at four points of history."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtiova import features as f
from virtiova.features import Feature, Generation, driver_features, mask, vring_transport_features

SINCE = [g for g in Generation if g is not Generation.BEFORE]
BIT = 1 << 33
# Written out once more, from the kernel's switch statements, and not taken from the source under test.
KEPT = {
    Generation.BEFORE: (28, 33, {28, 29, 32}),
    Generation.PATCH: (28, 34, {28, 29, 32, 33}),
    Generation.MAINLINE: (28, 34, {28, 29, 32, 33}),
    Generation.TODAY: (28, 42, {28, 29, 32, 33, 34, 35, 36, 38}),
}

generations = st.sampled_from(list(Generation))
words = st.integers(0, 2**64 - 1)
tables = st.integers(0, 2**24 - 1)
"""Feature tables of drivers: device-specific bits. No driver's table ever named a transport bit."""


def test_names_of_the_bits() -> None:
    assert [f.VIRTIO_F_IOMMU_PLATFORM, f.VIRTIO_F_ACCESS_PLATFORM] == [33, 33]
    assert Feature["ACCESS_PLATFORM"].value == 33
    assert (f.VIRTIO_TRANSPORT_F_START, f.VIRTIO_TRANSPORT_F_END) == (28, 34)
    assert f.VIRTIO_TRANSPORT_F_END_BEFORE == 33
    assert f.names(mask([0, 32, 33])) == ["bit 0", "VERSION_1", "ACCESS_PLATFORM"]
    assert f.names(0) == []


@pytest.mark.parametrize("bit", range(64))
@pytest.mark.parametrize("generation", Generation)
def test_one_bit_at_a_time(generation: Generation, bit: int) -> None:
    start, end, kept = KEPT[generation]
    stays = not start <= bit < end or bit in kept
    assert vring_transport_features(1 << bit, generation) == (1 << bit if stays else 0)


@given(words, generations)
def test_the_filter_is_idempotent_and_never_adds_a_bit(word: int, generation: Generation) -> None:
    once = vring_transport_features(word, generation)
    assert once & ~word == 0
    assert vring_transport_features(once, generation) == once


@given(words, words, generations)
def test_the_filter_looks_at_each_bit_alone(one: int, other: int, generation: Generation) -> None:
    parts = vring_transport_features(one, generation) | vring_transport_features(other, generation)
    assert vring_transport_features(one | other, generation) == parts


def test_today_is_the_default() -> None:
    everything = 2**64 - 1
    assert vring_transport_features(everything) == vring_transport_features(everything, Generation.TODAY)
    assert driver_features(everything, 0) == mask(KEPT[Generation.TODAY][2])


@given(words, tables)
def test_before_the_patch_bit_33_is_never_accepted(offered: int, table: int) -> None:
    assert not driver_features(offered | BIT, table, generation=Generation.BEFORE) & BIT


@given(words, tables, st.sampled_from(SINCE))
def test_since_the_patch_every_driver_takes_it_where_it_is_offered(
    offered: int, table: int, generation: Generation
) -> None:
    assert driver_features(offered | BIT, table, generation=generation) & BIT
    assert not driver_features(offered & ~BIT, table, generation=generation) & BIT


@given(words, tables, generations, st.booleans())
def test_a_driver_takes_only_what_was_offered(offered: int, table: int, generation: Generation, legacy: bool) -> None:
    taken = driver_features(offered, table, legacy=legacy, generation=generation)
    assert taken & ~offered == 0


@given(words, tables, generations)
def test_device_bits_need_the_driver_table(offered: int, table: int, generation: Generation) -> None:
    taken = driver_features(offered, table, generation=generation)
    assert taken & (2**24 - 1) == offered & table & (2**24 - 1)


@given(words, words, generations)
def test_the_legacy_interface_has_32_bits(offered: int, table: int, generation: Generation) -> None:
    taken = driver_features(offered, table, legacy=True, generation=generation)
    assert taken < 2**32
    assert taken == driver_features(offered, table, generation=generation) & (2**32 - 1)


@given(st.integers(0, 2**128 - 1))
def test_words_of_128_bits(word: int) -> None:
    """Feature words have grown to 128 bits: those above bit 63 are nobody's to clear."""
    assert vring_transport_features(word) >> 42 == word >> 42
    assert len(f.names(word)) == word.bit_count()


@pytest.mark.parametrize("generation", Generation)
@pytest.mark.parametrize("bit_33", [False, True])
@pytest.mark.parametrize("xen", [False, True])
def test_who_takes_addresses_from_the_dma_api(generation: Generation, bit_33: bool, xen: bool) -> None:
    wanted = xen if generation is Generation.BEFORE else bit_33 or xen
    # All other bits set: none of them may decide.
    features = (2**64 - 1) if bit_33 else (2**64 - 1) & ~BIT
    assert f.vring_use_dma_api(features, xen_domain=xen, generation=generation) is wanted
    assert f.vring_use_dma_api(BIT * bit_33, xen_domain=xen, generation=generation) is wanted


@given(words)
def test_the_quirk_is_bit_33_clear_and_nothing_else(word: int) -> None:
    assert f.virtio_has_iommu_quirk(word & ~BIT)
    assert not f.virtio_has_iommu_quirk(word | BIT)


def test_the_passthrough_hint_is_a_name_without_a_number() -> None:
    hint = f.VIRTIO_F_IOMMU_PASSTHROUGH
    assert hint == "VIRTIO_F_IOMMU_PASSTHROUGH"
    assert isinstance(hint, str)
    assert "IOMMU_PASSTHROUGH" not in Feature.__members__
    assert not any("PASSTHROUGH" in name for name in f.names(2**128 - 1))


@pytest.mark.parametrize("generation", Generation)
def test_nobody_acts_on_the_passthrough_hint(generation: Generation) -> None:
    hints = [f.VIRTIO_F_IOMMU_PASSTHROUGH]
    assert f.VIRTIO_F_IOMMU_PASSTHROUGH not in f.transport_hints(hints, generation)


def test_status_bits() -> None:
    healthy = f.Status.ACKNOWLEDGE | f.Status.DRIVER | f.Status.FEATURES_OK | f.Status.DRIVER_OK
    assert healthy == 0x0F
    assert (f.Status.DEVICE_NEEDS_RESET, f.Status.FAILED) == (64, 128)


@given(st.sets(st.integers(0, 127)))
def test_mask_and_has(bits: set[int]) -> None:
    word = mask(bits)
    assert {bit for bit in range(128) if f.has(word, bit)} == bits
