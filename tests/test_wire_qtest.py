# SPDX-License-Identifier: Apache-2.0
"""The qtest protocol as bytes: exact commands, and answers that may be anything at all."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from virtiova.errors import ProtocolError
from virtiova.wire import qtest
from virtiova.wire.qtest import Answer, Answers

# Lines as a machine could send them, honest or not, and bytes that are no line at all.
_line = st.one_of(
    st.sampled_from([b"OK", b"OK 0x00", b"OK little", b"FAIL Unknown command 'x'", b"ERR no", b"", b"\r"]),
    st.sampled_from([b"IRQ raise 10", b"IRQ lower 3", b"IRQ ", b"OKAY", b"ok", b" OK 0x1 ", b"\xff\xfe"]),
    st.binary(max_size=12).map(lambda data: b"OK 0x" + data.hex().encode()),
    st.binary(max_size=40),
)
streams = st.lists(_line, max_size=12).map(b"\n".join)


def feed_all(stream: bytes, cuts: list[int]) -> tuple[list[Answer], bool]:
    """The answers of a stream that arrives in pieces, and whether it ended in a `ProtocolError`."""
    answers = Answers()
    found: list[Answer] = []
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    try:
        for start, end in itertools.pairwise(edges):
            found += answers.feed(stream[start:end])
    except ProtocolError:
        return found, True
    return found, False


def test_commands() -> None:
    assert qtest.read(0xFED90008, 8) == b"read 0xfed90008 0x8\n"
    assert qtest.write(0x100000, b"\x01\xab") == b"write 0x100000 0x2 0x01ab\n"
    assert [qtest.port_in(0xCFC, size) for size in (1, 2, 4)] == [
        b"inb 0xcfc\n",
        b"inw 0xcfc\n",
        b"inl 0xcfc\n",
    ]
    assert [qtest.port_out(0xCF8, size, 0x80) for size in (1, 2, 4)] == [
        b"outb 0xcf8 0x80\n",
        b"outw 0xcf8 0x80\n",
        b"outl 0xcf8 0x80\n",
    ]
    assert qtest.ENDIANNESS == b"endianness\n"


@given(st.integers(0, 2**64 - 1), st.binary(min_size=1, max_size=64))
def test_a_command_is_one_line(address: int, data: bytes) -> None:
    for command in (qtest.read(address, len(data)), qtest.write(address, data)):
        assert command.count(b"\n") == 1
        assert command.endswith(b"\n")
        assert int(command.split()[1], 16) == address
    assert bytes.fromhex(qtest.write(address, data).split()[3][2:].decode()) == data


def test_answers() -> None:
    (only,) = Answers().feed(b"OK\n")
    assert only == Answer(True, "")
    (data,) = Answers().feed(b"OK 0x0102\r\n")
    assert data.data(2) == b"\x01\x02"
    (number,) = Answers().feed(b"OK 0xfee\n")
    assert number.number() == 0xFEE
    (failed,) = Answers().feed(b"FAIL Unknown command 'clock_step'\n")
    assert not failed.ok
    assert "clock_step" in failed.text


def test_interrupts_in_between_are_dropped() -> None:
    answers = Answers()
    assert answers.feed(b"IRQ raise 10\nOK 1\nIRQ lower 10\n\nOK 2\nIRQ ra") == [
        Answer(True, "1"),
        Answer(True, "2"),
    ]
    assert answers.feed(b"ise 3\n") == []


def test_half_a_line_is_kept_for_later() -> None:
    answers = Answers()
    assert answers.feed(b"O") == []
    assert answers.feed(b"K 0x") == []
    assert answers.feed(b"2a\nOK") == [Answer(True, "0x2a")]
    assert answers.feed(b"\n") == [Answer(True, "")]


@given(streams, st.lists(st.integers(0, 400), max_size=20))
@example(b"OK 0x0\nnonsense\nOK 0x1\n", [3, 9])
def test_the_same_answers_however_the_bytes_arrive(stream: bytes, cuts: list[int]) -> None:
    whole, broke = feed_all(stream, [])
    pieces, broke_too = feed_all(stream, cuts)
    assert broke is broke_too
    # After a broken line nothing counts; before it, the pieces can only have shown more.
    assert pieces[: len(whole)] == whole
    if not broke:
        assert pieces == whole


@given(st.binary(max_size=200))
def test_any_bytes_at_all(data: bytes) -> None:
    for answer in feed_all(data, [len(data) // 2])[0]:
        with contextlib.suppress(ProtocolError):
            assert len(answer.data(4)) == 4
        with contextlib.suppress(ProtocolError):
            answer.number()


@given(st.text("0123456789abcdefXx \t_-\u0661\ufffd", max_size=30), st.integers(0, 16))
def test_data_is_hex_of_the_wanted_length(text: str, length: int) -> None:
    try:
        data = Answer(True, "0x" + text).data(length)
    except ProtocolError:
        return
    assert len(data) == length


@pytest.mark.parametrize("text", ["", "0x", "0x0", "0x012", "0xzz", "0x0102", "1234", "little", "0x\u0661\u0661"])
def test_data_refuses(text: str) -> None:
    with pytest.raises(ProtocolError, match="qtest"):
        Answer(True, text).data(1)


def test_a_failure_holds_neither_data_nor_a_number() -> None:
    failed = Answer(False, "FAIL Unknown command 'inq'")
    with pytest.raises(ProtocolError, match="Unknown command"):
        failed.data(4)
    with pytest.raises(ProtocolError, match="Unknown command"):
        failed.number()


@pytest.mark.parametrize("text", ["", "0x", "little", "-0x1", "0x1 0x2"])
def test_numbers_refuse(text: str) -> None:
    with pytest.raises(ProtocolError, match="qtest"):
        Answer(True, text).number()


@pytest.mark.parametrize("line", [b"nonsense", b"OKAY 0x1", b"IRQ", b"ok", b"\xff\xff", b"\0"])
def test_lines_that_are_no_answer(line: bytes) -> None:
    with pytest.raises(ProtocolError, match="neither OK nor FAIL"):
        Answers().feed(line + b"\n")


def test_an_error_quotes_no_more_than_a_line_of_it() -> None:
    with pytest.raises(ProtocolError) as caught:
        Answers().feed(b"x" * 100_000 + b"\n")
    assert len(str(caught.value)) < 200


def feed_until_refused(pieces: Iterator[bytes]) -> int:
    """How many bytes went in before it was too much."""
    answers, fed = Answers(), 0
    for piece in pieces:
        fed += len(piece)
        try:
            answers.feed(piece)
        except ProtocolError:
            return fed
    raise AssertionError("nothing was refused")


def test_an_endless_line_is_refused_early() -> None:
    started = time.process_time()
    assert feed_until_refused(itertools.repeat(b"O" * 65536)) <= qtest.MAX_LINE + 65536
    assert time.process_time() - started < 5


@pytest.mark.parametrize("pieces", [1, 2, 32])
def test_an_overlong_line_is_refused_also_when_it_ends(pieces: int) -> None:
    """How the bytes are cut must not decide whether a line is too long."""
    line = b"OK 0x" + b"0" * qtest.MAX_LINE + b"\n"
    step = -(-len(line) // pieces)
    feed_until_refused(line[start : start + step] for start in range(0, len(line), step))


def test_the_longest_line_that_is_accepted() -> None:
    line = b"OK 0x" + b"0" * (qtest.MAX_LINE - 5)
    assert [len(answer.text) for answer in Answers().feed(line + b"\n")] == [qtest.MAX_LINE - 3]


def test_verbs_for_memory_and_firmware() -> None:
    assert qtest.fill(0x200000, 0x40000, 0) == b"memset 0x200000 0x40000 0x0\n"
    call = qtest.rtas("ibm,read-pci-config", 0x3F00000, 4, 0x3F00020, 2)
    assert call == b"rtas ibm,read-pci-config 4 0x3f00000 2 0x3f00020\n"
    for name in ("", "two words", "line\n", "\xe9"):
        with pytest.raises(ProtocolError):
            qtest.rtas(name, 0, 0, 0, 0)
