/* golden.h: token ids made by the reference (tests/golden/make_tokenizer.py), read for tests. */
#ifndef GRAFT_TESTS_GOLDEN_H
#define GRAFT_TESTS_GOLDEN_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/tokenizer.h"

/* Fail the test when the file can not be read. */
json_t *golden_load(const char *path);
char *golden_text(const char *path, size_t *len); /* free() it */
struct tokenizer *golden_tokenizer(const char *path);

/* Fails the test, naming `what`, where the ids differ. `ids`: a JSON array. */
void golden_compare(const char *what, const json_t *ids, const int32_t *got, size_t count);

/* Where SmolLM2-135M-Instruct is: $GRAFT_TEST_SMOLLM2 (a folder or a .gguf), else what the
 * demo fetched into .cache/models. NULL: not at hand; tests say so and skip. */
const char *golden_smollm2(void);

#endif
