# SPDX-License-Identifier: Apache-2.0
"""The debugger's protocol as bytes: what QEMU was seen to say, and streams that may be anything at all."""

from __future__ import annotations

import contextlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtiova.errors import ProtocolError
from virtiova.wire import gdb
from virtiova.wire.gdb import MAX_PAYLOAD, Packets

SPECIAL = b"$#}*"
plain = st.binary(max_size=60).map(lambda data: data.translate(None, SPECIAL))
registers = st.integers(0, 2**64 - 1)


def framed(body: bytes) -> bytes:
    """A packet as the manual describes it, whatever is in it."""
    return b"$" + body + b"#" + f"{sum(body) % 256:02x}".encode()


def feed(stream: bytes, cuts: list[int]) -> list[bytes]:
    """The payloads of a stream that arrives in pieces."""
    packets = Packets()
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    return [payload for start, end in itertools.pairwise(edges) for payload in packets.feed(stream[start:end])]


# -- what is sent -------------------------------------------------------------------------------------------------


def test_commands() -> None:
    # The examples of the GDB manual, and those that QEMU 7.2 answered.
    assert gdb.packet(b"OK") == b"$OK#9a"
    assert gdb.packet(b"") == b"$#00"
    assert (gdb.STEP, gdb.CONTINUE) == (b"$s#73", b"$c#63")
    assert (gdb.ACK, gdb.INTERRUPT) == (b"+", b"\x03")
    assert gdb.read_register(64) == framed(b"p40")
    assert gdb.write_register(65, 1 << 63 | 1 << 12) == framed(b"P41=8000000000001000")
    # Register numbers are hexadecimal, values most significant first, negative ones in two's complement.
    assert gdb.write_register(3, -1) == framed(b"P3=ffffffffffffffff")


@given(plain, st.lists(st.integers(0, 80), max_size=4))
def test_what_is_sent_can_be_read(payload: bytes, cuts: list[int]) -> None:
    assert feed(gdb.packet(payload), cuts) == [payload]


@pytest.mark.parametrize("payload", [b"a$", b"#", b"}", b"x*y", b"a" * (MAX_PAYLOAD + 1)])
def test_what_would_need_an_escape_is_not_sent(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        gdb.packet(payload)


# -- what comes back ----------------------------------------------------------------------------------------------


@given(st.lists(plain, max_size=6), st.lists(st.integers(0, 400), max_size=6), st.sampled_from([b"", b"+", b"++"]))
def test_a_stream_is_cut_anywhere(payloads: list[bytes], cuts: list[int], acks: bytes) -> None:
    stream = b"".join(acks + framed(payload) for payload in payloads)
    assert feed(stream, cuts) == payloads


def test_a_real_exchange() -> None:
    stream = b"+$T05thread:01;#07+$OK#9a+$fffffffffffffffc#5d"
    assert feed(stream, [1, 5, 20]) == [b"T05thread:01;", b"OK", b"fffffffffffffffc"]


def test_escapes_and_run_lengths() -> None:
    assert feed(framed(b"a}\x03b"), []) == [b"a#b"]
    # The manual's example: ``0* `` is four zeros.
    assert feed(framed(b"0* "), []) == [b"0000"]
    assert feed(framed(b"x0*%y"), []) == [b"x000000000y"]


def test_notices_are_dropped() -> None:
    body = b"Stop:T05"
    assert feed(b"%" + framed(body)[1:] + framed(b"OK"), []) == [b"OK"]


@pytest.mark.parametrize(
    "stream",
    [
        b"-",
        b"+-$OK#9a",
        b"OK\n",
        b"$OK#00",
        b"$OK#zz",
        b"$OK#-1",
        framed(b"a}"),
        framed(b"a*"),
        framed(b"* "),
        framed(b"a*\x1d"),
        b"$" + b"a" * (MAX_PAYLOAD + 8),
        framed(b"a" * (MAX_PAYLOAD + 1)),
        framed(b"a" + b"*~" * 700),
    ],
)
def test_what_is_no_packet_is_refused(stream: bytes) -> None:
    with pytest.raises(ProtocolError):
        feed(stream, [])


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=30),
            plain.map(framed),
            st.binary(max_size=20).map(lambda data: framed(data.translate(None, b"#"))),
            st.sampled_from([b"+", b"-", b"$", b"#", b"%x#78", b"$#00", b"}*"]),
        ),
        max_size=8,
    ).map(b"".join),
    st.lists(st.integers(0, 200), max_size=4),
)
def test_any_stream_gives_payloads_or_a_protocol_error(stream: bytes, cuts: list[int]) -> None:
    with contextlib.suppress(ProtocolError):
        for payload in feed(stream, cuts):
            assert len(payload) <= MAX_PAYLOAD


# -- what payloads mean -------------------------------------------------------------------------------------------


@given(registers)
def test_register_values(value: int) -> None:
    assert gdb.register_value(b"%016x" % value) == value
    assert gdb.register_value(b"%016X" % value) == value


@pytest.mark.parametrize(
    "payload", [b"", b"E01", b"00", b"x" * 16, b"-000000000000001", b"0_00000000000001", b" " * 16, b"0" * 17]
)
def test_what_is_no_register_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        gdb.register_value(payload)


def test_stops() -> None:
    assert gdb.stop_signal(b"T05thread:01;") == 5
    assert gdb.stop_signal(b"S02") == 2


@given(st.binary(max_size=24))
def test_any_payload_means_something_or_is_refused(payload: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert 0 <= gdb.register_value(payload) < 2**64
    with contextlib.suppress(ProtocolError):
        assert 0 <= gdb.stop_signal(payload) < 256
    with contextlib.suppress(ProtocolError):
        gdb.expect_ok(payload)
        assert payload == b"OK"
