/* SPDX-License-Identifier: Apache-2.0 */
/* What the fuzz targets have in common: bytes that become numbers, and wants that end the process where they fail. */
#ifndef VIRTIOVA_FUZZ_H
#define VIRTIOVA_FUZZ_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define WANT(what)                                                                     \
    do {                                                                               \
        if (!(what)) {                                                                 \
            fprintf(stderr, "fuzz: %s:%d: wanted %s\n", __FILE__, __LINE__, #what); \
            abort();                                                                   \
        }                                                                              \
    } while (0)

/* Zeroes once it is used up. */
struct input {
    const uint8_t *at;
    size_t left;
};

static inline uint64_t take(struct input *input, unsigned bytes)
{
    uint64_t value = 0;

    while (bytes-- && input->left) {
        value = value << 8 | *input->at++;
        input->left--;
    }
    return value;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif
