/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A memcpy of which the instructions can be counted (instructions.c). That of the C library chooses by processor, and by
 * how the two addresses lie to each other, which is another way in each run of another program.
 */
#include <stddef.h>

typedef long long wide __attribute__((vector_size(16), aligned(1), may_alias));

__attribute__((optimize("no-tree-loop-distribute-patterns"))) void *memcpy(void *restrict to, const void *restrict from,
                                                                         size_t length)
{
    char *out = to;
    const char *in = from;

    for (; length >= 64; length -= 64, out += 64, in += 64) {
        const wide *source = (const wide *)in;
        wide *target = (wide *)out;

        target[0] = source[0];
        target[1] = source[1];
        target[2] = source[2];
        target[3] = source[3];
    }
    while (length--)
        *out++ = *in++;
    return to;
}
