# SPDX-License-Identifier: Apache-2.0
"""Messages at random to the socket of a real server: it answers, refuses or hangs up, and serves the next one."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hostile_kit import Closed, LiveFrontEnd, Served, served
from serve_kit import GPA_BASE, IOVA_BASE, PAGE, PLAIN, RAM, RING, SIZE, USED, UVA_BASE, WITH_BIT
from virtiova.addr import GPA, IOVA, UVA, Access
from virtiova.wire import vhost_user as wire
from virtiova.wire.vhost_user import (
    ConfigSpace,
    InflightDescription,
    IotlbKind,
    IotlbMessage,
    LogDescription,
    MemoryRegion,
    Message,
    Request,
    VringAddr,
    VringState,
)

EDGES = [
    *(0, 1, 2, 3, PAGE - 1, PAGE, RAM, GPA_BASE, UVA_BASE, IOVA_BASE),
    *(1 << 32, 1 << 63, (1 << 64) - PAGE, (1 << 64) - 1),
]
u64 = st.sampled_from(EDGES) | st.integers(0, (1 << 64) - 1)
u32 = st.sampled_from([0, 1, 2, 7, 8, 128, 32768, 65535, (1 << 32) - 1]) | st.integers(0, (1 << 32) - 1)
u16 = st.sampled_from([0, 1, 2, 8, 32768, 65535]) | st.integers(0, 65535)
index = st.integers(0, 3)
pages = st.integers(0, RAM // PAGE + 1).map(lambda page: page * PAGE)
places = st.sampled_from([UVA_BASE, IOVA_BASE, GPA_BASE]).flatmap(
    lambda base: st.sampled_from([base + RING, base + USED, base + RING + 16 * SIZE, base, base + 1])
)
regions = st.builds(
    MemoryRegion,
    st.builds(GPA, u64) | pages.map(lambda at: GPA(GPA_BASE + at)),
    pages | u64,
    st.builds(UVA, u64) | pages.map(lambda at: UVA(UVA_BASE + at)),
    pages | u64,
)
iotlb = st.builds(
    IotlbMessage,
    st.builds(IOVA, u64) | pages.map(lambda at: IOVA(IOVA_BASE + at)),
    pages | u64,
    st.builds(UVA, u64) | pages.map(lambda at: UVA(UVA_BASE + at)),
    st.sampled_from(list(Access)),
    st.sampled_from(list(IotlbKind)),
)
BODIES: dict[int, st.SearchStrategy[bytes]] = {
    Request.SET_FEATURES: st.sampled_from([PLAIN, WITH_BIT, WITH_BIT | 1 << wire.F_LOG_ALL]).map(wire.u64),
    Request.SET_PROTOCOL_FEATURES: u64.map(lambda bits: wire.u64(bits & 0x1B22B | 8)),
    Request.SET_MEM_TABLE: st.lists(regions, max_size=9).map(wire.encode_table),
    Request.ADD_MEM_REG: regions.map(MemoryRegion.encode_single),
    Request.REM_MEM_REG: regions.map(MemoryRegion.encode_single),
    Request.SET_LOG_BASE: st.builds(LogDescription, pages | u64, pages | u64).map(LogDescription.encode),
    Request.SET_VRING_NUM: st.builds(VringState, index, u32).map(VringState.encode),
    Request.SET_VRING_BASE: st.builds(VringState, index, u32).map(VringState.encode),
    Request.GET_VRING_BASE: st.builds(VringState, index, u32).map(VringState.encode),
    Request.SET_VRING_ENABLE: st.builds(VringState, index, st.integers(0, 2)).map(VringState.encode),
    Request.SET_VRING_ADDR: st.builds(VringAddr, index, u32, *[places | u64] * 3, u64).map(VringAddr.encode),
    Request.SET_VRING_KICK: st.builds(wire.encode_vring_fd, index, st.booleans()),
    Request.SET_VRING_CALL: st.builds(wire.encode_vring_fd, index, st.booleans()),
    Request.SET_VRING_ERR: st.builds(wire.encode_vring_fd, index, st.booleans()),
    Request.IOTLB_MSG: iotlb.map(IotlbMessage.encode),
    Request.GET_CONFIG: st.builds(ConfigSpace, u32, u32, st.binary(max_size=260)).map(ConfigSpace.encode),
    Request.SET_CONFIG: st.builds(ConfigSpace, u32, u32, st.binary(max_size=260)).map(ConfigSpace.encode),
    Request.GET_INFLIGHT_FD: st.builds(InflightDescription, u64, u64, index, u16).map(InflightDescription.encode),
    Request.SET_INFLIGHT_FD: st.builds(InflightDescription, pages | u64, pages, index, u16).map(
        InflightDescription.encode
    ),
    Request.SET_STATUS: u64.map(wire.u64),
}
DESCRIPTORS = ("memory", "kick", "channel", "pipe", "folder", "connection")
descriptors = st.lists(st.sampled_from(DESCRIPTORS), max_size=2)


@st.composite
def messages(draw: st.DrawFn) -> tuple[bytes, list[str]]:
    """A request that could be one, with bytes that are or are not its own."""
    usual = st.sampled_from(sorted(BODIES))
    request = draw(usual if draw(st.integers(0, 9)) else st.integers(0, 48))
    body = draw(BODIES.get(request, st.binary(max_size=16)))
    if draw(st.integers(0, 29)) == 29:
        body = draw(st.binary(max_size=48))
    message = Message(request, body, need_reply=draw(st.integers(0, 15)) < 15)
    fitting: dict[int, list[str]] = {
        Request.SET_MEM_TABLE: ["memory"] * min(8, len(body) // 32),
        Request.ADD_MEM_REG: ["memory"],
        Request.SET_LOG_BASE: ["memory"],
        Request.SET_INFLIGHT_FD: ["memory"],
        Request.SET_BACKEND_REQ_FD: ["channel"],
        **dict.fromkeys(
            (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR),
            ["kick"] if body[1:2] == b"\0" else [],
        ),
    }
    with_ = draw(descriptors) if draw(st.integers(0, 9)) == 9 else fitting.get(request, [])
    return message.encode(), with_


kicks = st.sampled_from(["kick", "kick", "kick", "write", "map", "shrink"])
noise = st.tuples(st.binary(min_size=1, max_size=40), descriptors)
steps = st.lists(
    st.integers(0, 39).flatmap(
        lambda n: (
            messages() if n < 32 else kicks if n < 38 else st.tuples(st.binary(min_size=1, max_size=40), descriptors)
        )
    ),
    min_size=1,
    max_size=25,
)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("fuzz"), "blk", "--memory", "1M", "--num-queues", "2") as server:
        yield server


def drain(sock: socket.socket) -> bool:
    """Take in what is there; whether the other side is."""
    while select.select([sock], [], [], 0)[0]:
        # Descriptors that nobody makes room for are closed by the kernel.
        if not sock.recv(4096):
            return False
    return True


def act(front_end: LiveFrontEnd, step: object, noise: bytes) -> None:
    fds = {"memory": front_end.file, "kick": front_end.kicks[0], "channel": front_end.theirs.fileno()}
    match step:
        case "kick":
            front_end.kick()
        case "map":
            for page in range(16):
                update = IotlbMessage(
                    IOVA(IOVA_BASE + page * PAGE), PAGE, UVA(UVA_BASE + page * PAGE), Access.RW, IotlbKind.UPDATE
                )
                front_end.raw(Message(Request.IOTLB_MSG, update.encode(), need_reply=True).encode())
        case "write":
            front_end.put(RING, noise)
            front_end.put(USED, noise)
        case "shrink":
            os.ftruncate(front_end.file, PAGE)
        case (bytes() as data, list() as kinds):
            own: list[int] = []
            for kind in kinds:
                if kind == "pipe":
                    own += os.pipe()
                elif kind == "folder":
                    own.append(os.open("/", os.O_PATH))
                else:
                    own.append(os.dup(fds.get(kind, front_end.sock.fileno())))
            try:
                front_end.raw(data, own[:8])
            finally:
                for fd in own:
                    os.close(fd)


def one_round(live: Served, ready: bool, todo: list[object], noise: bytes) -> None:
    with live.front_end() as front_end:
        if ready:
            front_end.ready(rings=2)
        with contextlib.suppress(Closed, ConnectionError):
            for step in todo:
                act(front_end, step, noise)
                if not drain(front_end.sock) or not drain(front_end.back):
                    break
        # The server takes all of it in, sees the end (even if it holds this end itself), and closes.
        with contextlib.suppress(OSError):
            front_end.sock.shutdown(socket.SHUT_WR)
            while front_end.sock.recv(4096):
                pass
    assert live.process.poll() is None, live.log[-3000:]


given_steps = given(st.sampled_from([True, True, True, False]), steps, st.binary(min_size=150, max_size=300))
quiet = settings(
    phases=[Phase.generate], deadline=None, suppress_health_check=list(HealthCheck), database=None, max_examples=300
)


@quiet
@given_steps
def test_messages_at_random(live: Served, ready: bool, todo: list[object], noise: bytes) -> None:
    one_round(live, ready, todo, noise)


def test_the_next_one_is_served(live: Served) -> None:
    """After all of that. It may have to wait until an unfinished message is given up."""
    before = live.process.pid
    live.serves()
    assert live.process.pid == before


@pytest.mark.sweep
@settings(quiet, max_examples=2500)
@given_steps
def test_many_messages_at_random(live: Served, ready: bool, todo: list[object], noise: bytes) -> None:
    one_round(live, ready, todo, noise)
    live.serves()
