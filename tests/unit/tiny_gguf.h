/* tiny_gguf.h: the models of tiny_model.h (of the sizes that 0 stands for there, tied) as GGUF
 * files in F32, for tests: the same values, rows of q and k interleaved as the format has them. */
#ifndef GRAFT_TESTS_TINY_GGUF_H
#define GRAFT_TESTS_TINY_GGUF_H

#include "engine/base/err.h"
#include "tests/unit/gguf_builder.h"

struct tiny_gguf {
    uint64_t seed;
    const char *pre_tokenizer;             /* NULL: smollm */
    void (*spoil)(struct gguf_builder *b); /* before it is written; NULL: nothing */
};

int tiny_gguf_write(const char *path, const struct tiny_gguf *gguf, struct err *err);

#endif
