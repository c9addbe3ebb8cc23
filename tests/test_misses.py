# SPDX-License-Identifier: Apache-2.0
"""What a back end remembers of its questions has a bound, whether they are answered or not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from virtiova.addr import PAGE_SIZE, Access
from virtiova.errors import ProtocolError
from virtiova.serve.misses import ANSWER_SECONDS, MAX_ASKED, MAX_REFUSED, Misses, Want
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import BackendRequest, Framer, Message


def wants(start: int, count: int) -> Iterator[Want]:
    for page in range(start, start + count):
        yield page * PAGE_SIZE, Access.READ


def decoded(messages: list[bytes]) -> list[Message]:
    framer = Framer()
    return [message for data in messages for message in framer.feed(data)]


@pytest.mark.parametrize("replies", [False, True])
def test_so_many_are_asked_for_and_no_more(replies: bool) -> None:
    misses = Misses(replies=replies)
    assert len(misses.ask(wants(0, 2 * MAX_ASKED), 0.0)) == MAX_ASKED
    assert misses.ask(wants(2 * MAX_ASKED, 1), 1.0) == []
    assert misses.expire(ANSWER_SECONDS) == MAX_ASKED
    assert len(misses.ask(wants(2 * MAX_ASKED, 1), 6.0)) == 1


def test_a_front_end_that_maps_and_never_answers_is_asked_on() -> None:
    """Without wanting an answer, once as many are due as are kept; those that come late are still taken in order."""
    misses = Misses(replies=True)
    first = decoded(misses.ask(wants(0, MAX_ASKED), 0.0))
    assert all(message.need_reply for message in first)
    misses.changed(0, MAX_ASKED * PAGE_SIZE)
    (later,) = decoded(misses.ask(wants(MAX_ASKED, 1), 0.0))
    assert not later.need_reply
    answer = Message(BackendRequest.IOTLB_MSG, wire.u64(1), reply=True).encode()
    assert sum(misses.receive(answer) for _ in range(MAX_ASKED)) == MAX_ASKED
    assert not misses.refused((MAX_ASKED * PAGE_SIZE, Access.READ))
    with pytest.raises(ProtocolError):
        misses.receive(answer)


def test_refusals_are_forgotten_before_they_are_too_many() -> None:
    misses = Misses(replies=False)
    for start in range(0, MAX_REFUSED + 1, MAX_ASKED):
        misses.ask(wants(start, MAX_ASKED), 0.0)
        misses.expire(ANSWER_SECONDS)
    known = sum(misses.refused(want) for want in wants(0, MAX_REFUSED + MAX_ASKED))
    assert 0 < known <= MAX_REFUSED


@pytest.mark.parametrize(
    ("start", "size", "gone"),
    [
        ((1 << 64) - PAGE_SIZE, 2 * PAGE_SIZE, {0, (1 << 64) - PAGE_SIZE}),
        ((1 << 64) - 1, 2, {0, (1 << 64) - PAGE_SIZE}),
        (8 * PAGE_SIZE, 0, {0, 8 * PAGE_SIZE, (1 << 64) - PAGE_SIZE}),
        (8 * PAGE_SIZE, PAGE_SIZE, {8 * PAGE_SIZE}),
        (8 * PAGE_SIZE, 1, {8 * PAGE_SIZE}),
        (7 * PAGE_SIZE, PAGE_SIZE, set()),
        (9 * PAGE_SIZE - 1, 1, {8 * PAGE_SIZE}),
    ],
)
@pytest.mark.parametrize("refuse", [False, True])
def test_what_the_front_end_speaks_of_may_wrap(start: int, size: int, gone: set[int], *, refuse: bool) -> None:
    """As with the mappings: a stale refusal would fail a request, a stale question would be waited for."""
    pages = {0, 8 * PAGE_SIZE, (1 << 64) - PAGE_SIZE}
    misses = Misses(replies=False)
    misses.ask(((page, Access.READ) for page in pages), 0.0)
    if refuse:
        misses.expire(ANSWER_SECONDS)
    misses.changed(start, size)
    if refuse:
        assert {page for page in pages if not misses.refused((page, Access.READ))} == gone
    else:
        assert len(misses.ask(((page, Access.READ) for page in pages), 0.0)) == len(gone)


@pytest.mark.parametrize("forget", ["said", "forgotten", "late"])
@pytest.mark.parametrize("first", [0, 1])
def test_an_answer_is_that_of_its_question(forget: str, first: int) -> None:
    """Asked twice: the first answer says how it was, the second how it is."""
    misses = Misses(replies=True)
    (want,) = wants(3, 1)
    assert len(misses.ask([want], 0.0)) == 1
    match forget:
        case "said":
            misses.changed(want[0], PAGE_SIZE)
        case "forgotten":
            misses.forget()
        case "late":
            misses.expire(ANSWER_SECONDS)
            misses.forgive([want])
    assert len(misses.ask([want], 6.0)) == 1
    for answer in (first, 1 - first):
        misses.receive(Message(BackendRequest.IOTLB_MSG, wire.u64(answer), reply=True).encode())
        assert misses.refused(want) is (answer == 1 != first)


def test_descriptors_in_an_answer_are_given_back_at_once() -> None:
    misses = Misses(replies=True)
    misses.ask(wants(0, 1), 0.0)
    with pytest.raises(ProtocolError, match="file descriptors"):
        misses.receive(b"\1", (77,))
    assert misses.abandon() == (77,)
