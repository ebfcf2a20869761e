/* fuzz.h: what fuzz targets share. A target is LLVMFuzzerTestOneInput in a file of its own; linked
 * with libFuzzer it searches, with replay_main.c it runs files that were found or made before. */
#ifndef GRAFT_TESTS_FUZZ_H
#define GRAFT_TESTS_FUZZ_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/err.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* A refusal blames the input, in words. */
static inline void fuzz_check_error(const struct err *err)
{
    if ((err->kind != ERR_INVALID && err->kind != ERR_NO_MEMORY) || err->message[0] == '\0')
        abort();
}

#endif
