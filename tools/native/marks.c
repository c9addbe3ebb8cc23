/* SPDX-License-Identifier: Apache-2.0 */
/* What a Python program tells callgrind, called by ctypes (tests/python_requests.py). */
#include <valgrind/callgrind.h>

/* From here on instructions are looked at, which takes 50 times as long. */
void vv_begin(void)
{
    CALLGRIND_START_INSTRUMENTATION;
}

/* Count, or count no more. */
void vv_toggle(void)
{
    CALLGRIND_TOGGLE_COLLECT;
}

void vv_done(const char *name)
{
    CALLGRIND_DUMP_STATS_AT(name);
}
