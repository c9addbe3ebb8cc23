# SPDX-License-Identifier: Apache-2.0
"""A program on one processor: ``pinned.py CPU REALTIME SOCKET PROGRAM [ARGUMENT ...]``, run by its path.

Imports nothing of ours, so that it costs little. CPU -1 is any: for who does that himself. What a program of DPDK's
leaves behind goes to where SOCKET is.
"""

import os
import sys

if __name__ == "__main__":
    if int(sys.argv[1]) >= 0:
        os.sched_setaffinity(0, {int(sys.argv[1])})
    if int(sys.argv[2]):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(int(sys.argv[2])))
    os.environ["RUNTIME_DIRECTORY"] = os.path.dirname(sys.argv[3])
    try:
        os.execvp(sys.argv[4], sys.argv[4:])
    except OSError as error:
        sys.exit(f"{sys.argv[4]}: {error.strerror}")
