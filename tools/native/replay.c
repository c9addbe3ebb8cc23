/* SPDX-License-Identifier: Apache-2.0 */
/* A fuzz target without a fuzzer: runs the inputs in the files whose names come in, one a line. */
#include <string.h>

#include "fuzz.h"

int main(void)
{
    static uint8_t data[1 << 16];
    char name[4096];

    while (fgets(name, sizeof name, stdin)) {
        FILE *file;

        name[strcspn(name, "\n")] = 0;
        if (!(file = fopen(name, "rb")))
            return 1;
        LLVMFuzzerTestOneInput(data, fread(data, 1, sizeof data, file));
        fclose(file);
    }
    return 0;
}
