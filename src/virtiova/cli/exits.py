# SPDX-License-Identifier: Apache-2.0
"""Exit statuses, the same for every command."""

from __future__ import annotations

from typing import Final

OK: Final = 0
"""Nothing found."""
FOUND: Final = 1
USAGE: Final = 2
COULD_NOT_LOOK: Final = 3
INTERNAL: Final = 70
"""Our bug."""
NOT_POSSIBLE: Final = 77
"""Not possible on this machine."""
HUNG_UP: Final = 129
"""From here on 128 and the number of the signal that ended us: SIGHUP, SIGINT, SIGTERM."""
INTERRUPTED: Final = 130
TERMINATED: Final = 143
