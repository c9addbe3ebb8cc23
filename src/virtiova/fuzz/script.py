# SPDX-License-Identifier: Apache-2.0
"""A finding as a Python program that shows it again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from virtiova import __version__
from virtiova.errors import VirtiovaError
from virtiova.fuzz.findings import Finding, Step
from virtiova.fuzz.play import Player
from virtiova.machine.backend import BackEnd

_TIMES: Final = 3
_SCRIPT: Final = '''\
#!/usr/bin/env python3
"""Shows again what virtiova {version} found by fuzzing: {kind}.

{seen}

Exit status: 1 if it is there, 0 if it is not.
"""

import sys

from virtiova.fuzz import replay

SPAWN = {spawn!r}
KIND = {device!r}
STEPS = [
{steps}
]

if __name__ == "__main__":
    sys.exit(replay(SPAWN, KIND, STEPS{extra}))
'''


def script(finding: Finding, backend: BackEnd) -> str:
    """The program: nothing in it but the back end's command and the steps."""
    steps = "\n".join(f"    {step!r}," for step in finding.steps)
    extra = "".join(f", {name}=True" for name in ("write", "echo") if getattr(backend, name))
    seen = finding.seen.replace("\\", "/").replace('"""', "'''")
    return _SCRIPT.format(
        version=__version__,
        kind=finding.kind,
        seen=seen,
        spawn=backend.spawn,
        device=backend.kind,
        steps=steps,
        extra=extra,
    )


def replay(spawn: str, kind: str, steps: Sequence[Step], *, write: bool = False, echo: bool = False) -> int:
    """Play ``steps`` against a fresh back end, up to three times, and say what comes of it; the exit status: 1 if
    something was found, 0 if nothing was, 3 if the back end does not come up."""
    try:
        for _ in range(_TIMES):
            with Player(BackEnd(spawn=spawn, kind=kind, write=write, echo=echo)) as player:
                finding = player.play(steps)
            if finding is not None:
                print(f"{finding.kind}: {finding.seen}")
                for line in finding.words:
                    print(f"  {line}")
                return 1
    except VirtiovaError as error:
        print(f"virtiova: {error}")
        return 3
    print("nothing found")
    return 0
