# SPDX-License-Identifier: Apache-2.0
"""The fuzzer: what is played, what is granted, what is found of mistakes in our own back end, and the program."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from fuzz_mutant import MISTAKES
from virtiova.addr import GPA, IOVA, PAGE_SIZE, UVA, Access
from virtiova.fuzz.campaign import Piece, play
from virtiova.fuzz.findings import Finding, Step
from virtiova.fuzz.generate import SETUP, sequence
from virtiova.fuzz.ledger import Ledger
from virtiova.fuzz.minimise import Minimiser
from virtiova.fuzz.play import Player
from virtiova.fuzz.script import script
from virtiova.fuzz.steps import STEPS
from virtiova.machine.backend import BackEnd
from virtiova.machine.vhost_user.memory import REGIONS
from virtiova.wire.vhost_user import IotlbKind, IotlbMessage

MUTANT = Path(__file__).with_name("fuzz_mutant.py")
DISK = "serve blk {image} --io python --sandbox off --socket-path {socket}"
HONEST = {
    "blk": "serve blk {image} --socket-path {socket}",
    "net": "serve net --datagram-fd {net} --socket-path {socket}",
    "rng": "serve rng --socket-path {socket}",
}
KNOWN: dict[str, list[Step]] = {
    "crash": [(SETUP, 1, 0, 8, 0, 0), ("write", 2, 0), ("offer", 0, 0, 4095, 1 << 31, 0, 0)],
    "hang": [(SETUP, 1, 0, 8, 0, 0), ("answer", 0), ("message", 8, bytes(8).hex(), 0, 0)],
    "stray": [(SETUP, 1, 0, 16, 0, 0), ("write", 2, 0), ("pause", 50), ("flush",), ("write", 1, 0), ("pause", 3)],
    "lost": [(SETUP, 1, 0, 16, 0, 0), ("hold",), ("flush",), ("write", 1, 0), ("pause", 3), ("flush",), ("pause", 3)],
}
"""For each mistake a sequence that brings it out."""


def mutant(name: str) -> BackEnd:
    return BackEnd(spawn=f"{sys.executable} {MUTANT} {name} {DISK}", kind="blk")


def honest(kind: str) -> BackEnd:
    return BackEnd(spawn=f"{sys.executable} -m virtiova {HONEST[kind]}", kind=kind)


def test_the_same_seed_gives_the_same_sequences() -> None:
    assert sequence(5, 17) == sequence(5, 17)
    assert sequence(5, 17) != sequence(5, 18)
    assert sequence(5, 17) != sequence(6, 17)


def test_steps_are_data() -> None:
    seen: set[str] = set()
    for number in range(300):
        (setup, *_), *steps = sequence(1, number)
        assert setup == SETUP
        seen.update(str(name) for name, *_ in steps)
        assert [tuple(step) for step in json.loads(json.dumps(steps))] == steps
    assert seen == set(STEPS)


def test_half_of_the_sequences_are_good() -> None:
    good = [all(STEPS[str(name)].good for name, *_ in sequence(2, number)[1:]) for number in range(200)]
    assert 70 < sum(good) < 140


def test_a_sequence_is_made_as_short_as_it_can_be() -> None:
    rng = random.Random(1)
    steps: list[Step] = [(SETUP, 1, 1, 64, 7, 1), *((f"step{n}", rng.randrange(1000)) for n in range(40))]
    wanted = {("step7", 1), ("step23", 1)}

    def still(candidate: Sequence[Step]) -> bool:
        assert candidate[0][0] == SETUP
        names = {name for name, *_ in candidate}
        # The numbers of one of them matter.
        return {name for name, _ in wanted} <= names and all(
            int(numbers[0]) >= 1 for name, *numbers in candidate if name == "step23"
        )

    minimiser = Minimiser(still, 60.0)
    assert minimiser.shorten(steps) == [(SETUP, 0, 0, 0, 0, 0), ("step7", 0), ("step23", 1)]
    assert minimiser.tries < 400


def test_making_short_ends_in_time() -> None:
    clock = iter(range(1000))
    steps: list[Step] = [(SETUP,), *(("step",) for _ in range(64))]
    minimiser = Minimiser(lambda _: False, 5.0, lambda: float(next(clock)))
    assert minimiser.shorten(steps) == steps
    assert minimiser.tries < 5


def update(iova: int, uaddr: int, size: int = PAGE_SIZE, perm: Access = Access.RW) -> IotlbMessage:
    return IotlbMessage(IOVA(iova), size, UVA(uaddr), perm, IotlbKind.UPDATE)


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


MIDDLE = REGIONS[1]


def device_writes(ledger: Ledger, offset: int) -> None:
    ledger.memory.fill(offset, b"\xee")


def test_our_own_writes_are_no_strays(ledger: Ledger) -> None:
    ram = ledger.memory.ram
    ram.write(GPA(MIDDLE.gpa + 5), b"abc")
    ram.store16(GPA(MIDDLE.gpa + 16), 0x1234)
    ram.store32(GPA(MIDDLE.gpa + 20), 0x12345678, "big")
    assert ledger.strayed() == ""


def test_what_was_not_granted_may_not_change(ledger: Ledger) -> None:
    ledger.told(update(0x1000, MIDDLE.uva))
    device_writes(ledger, MIDDLE.offset + PAGE_SIZE - 1)
    assert ledger.strayed() == ""
    device_writes(ledger, MIDDLE.offset + PAGE_SIZE)
    assert f"guest-physical 0x{MIDDLE.gpa + PAGE_SIZE:x}" in ledger.strayed()


@pytest.mark.parametrize("offset", [0, REGIONS[2].offset - 1, REGIONS[0].offset + REGIONS[0].size])
def test_around_the_regions_nothing_may_change(ledger: Ledger, offset: int) -> None:
    ledger.granted(REGIONS)
    device_writes(ledger, REGIONS[0].offset)
    assert ledger.strayed() == ""
    device_writes(ledger, offset)
    assert "in no region" in ledger.strayed()


def test_reading_is_no_grant_to_write(ledger: Ledger) -> None:
    ledger.told(update(0x1000, MIDDLE.uva, perm=Access.READ))
    device_writes(ledger, MIDDLE.offset)
    assert ledger.strayed()


def test_what_is_taken_back_may_not_change_from_then_on(ledger: Ledger) -> None:
    ledger.told(update(0x1000, MIDDLE.uva))
    taken = ledger.takes_back(0x1000, PAGE_SIZE)
    device_writes(ledger, MIDDLE.offset)
    assert ledger.strayed() == "", "it is not acknowledged yet"
    ledger.took_back(taken)
    assert ledger.strayed() == "", "it came before"
    device_writes(ledger, MIDDLE.offset + 1)
    assert ledger.strayed()


def test_what_is_told_meanwhile_is_granted_anew(ledger: Ledger) -> None:
    ledger.told(update(0x1000, MIDDLE.uva))
    taken = ledger.takes_back(0x1000, PAGE_SIZE)
    ledger.told(update(0x1000, MIDDLE.uva))
    ledger.took_back(taken)
    device_writes(ledger, MIDDLE.offset)
    assert ledger.strayed() == ""


def test_a_page_with_two_addresses_stays_granted_by_the_other(ledger: Ledger) -> None:
    ledger.told(update(0x1000, MIDDLE.uva))
    ledger.told(update(0x9000, MIDDLE.uva))
    ledger.took_back(ledger.takes_back(0x1000, PAGE_SIZE))
    device_writes(ledger, MIDDLE.offset)
    assert ledger.strayed() == ""


def test_half_a_page_taken_back_stays_granted(ledger: Ledger) -> None:
    ledger.told(update(0x1000, MIDDLE.uva))
    ledger.took_back(ledger.takes_back(0x1800, 0x800))
    device_writes(ledger, MIDDLE.offset)
    assert ledger.strayed() == ""


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_seen(name: str) -> None:
    with Player(mutant(name), 1.0) as player:
        # A back end that has no processor for a while has not come so far: it is given another chance.
        tries = (player.play(KNOWN[name]) for _ in range(5))
        found = next((each for each in tries if each is not None), None)
    assert found is not None
    assert found.kind == MISTAKES[name][0], found


@pytest.mark.parametrize("name", MISTAKES)
def test_what_brings_out_a_mistake_brings_out_nothing_else(name: str) -> None:
    with Player(honest("blk")) as player:
        assert player.play(KNOWN[name]) is None


@pytest.mark.sweep
@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found_and_made_short(name: str) -> None:
    for first in range(0, 400, 25):
        finding = play(Piece(mutant(name), 1, first, 25, 60.0)).finding
        if finding is not None and finding.again:
            break
    assert finding is not None
    assert finding.kind == MISTAKES[name][0], finding
    # Whether a request is lost is a matter of time, too: a step whose absence once lost nothing is kept.
    longest = len(sequence(1, finding.sequence)) if name == "lost" else 6
    assert len(finding.steps) <= longest, finding


@pytest.mark.parametrize("kind", HONEST)
def test_an_honest_back_end_stands_it(kind: str) -> None:
    played = play(Piece(honest(kind), 3, 0, 12, 30.0))
    assert played.finding is None, played.finding
    assert played.steps > 100


@pytest.mark.sweep
@pytest.mark.parametrize("kind", HONEST)
def test_an_honest_back_end_stands_it_for_long(kind: str) -> None:
    played = play(Piece(honest(kind), 4, 0, 400, 120.0))
    assert played.finding is None, played.finding


def test_a_program_shows_it_again(tmp_path: Path) -> None:
    program = tmp_path / "found.py"
    found = Finding("crash", 'it "ended" """so"""', KNOWN["crash"])
    program.write_text(script(found, mutant("crash")))
    shown = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60, check=False)
    assert shown.returncode == 1, shown
    assert shown.stdout.startswith("crash: its process ended by signal 11")
    program.write_text(script(found, honest("blk")))
    shown = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60, check=False)
    assert (shown.returncode, shown.stdout) == (0, "nothing found\n")


def virtiova(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "virtiova", "fuzz", "vhost-user", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )


def test_the_command_says_what_was_played() -> None:
    done = virtiova("--spawn", honest("rng").spawn, "--type", "rng", "--sequences", "3", "--jobs", "1", "-j")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["sequences"] == 3
    assert document["finding"] is None


def test_the_command_writes_the_program(tmp_path: Path) -> None:
    program = tmp_path / "found.py"
    words = ("--spawn", mutant("crash").spawn, "--type", "blk", "--seed", "3", "--jobs", "1", "-o", str(program))
    done = virtiova(*words, "--sequences", "10")
    assert done.returncode == 1, done
    assert done.stdout.startswith("crash: its process ended by signal 11"), done
    assert "found.py shows it again" in done.stdout
    assert "from virtiova.fuzz import replay" in program.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--time", "0"], "--time takes"),
        (["--sequences", "0"], "--sequences takes"),
        (["--jobs", "0"], "--jobs takes"),
        (["--type", "blq"], "blk"),
    ],
)
def test_what_makes_no_sense_is_said(words: list[str], said: str) -> None:
    done = virtiova("--spawn", honest("rng").spawn, *words)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_back_end_that_does_not_come_up_is_no_finding() -> None:
    done = virtiova("--spawn", f"{sys.executable} -c pass {{socket}}", "--type", "blk", "--sequences", "1")
    assert (done.returncode, done.stdout) == (3, "")
    assert "the back end ended before it listened" in done.stderr
