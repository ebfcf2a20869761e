/* gguf_builder.h: GGUF files in memory for tests, valid ones and broken ones: every number is
 * written as it is given. */
#ifndef GRAFT_TESTS_GGUF_BUILDER_H
#define GRAFT_TESTS_GGUF_BUILDER_H

#include <stddef.h>
#include <stdint.h>

#include "engine/base/strbuf.h"

struct gguf_builder {
    struct strbuf entries, tensors, data;
    uint64_t entry_count, tensor_count;
};

void gguf_builder_init(struct gguf_builder *b);
void gguf_builder_release(struct gguf_builder *b);

void gguf_put_int(struct strbuf *out, uint64_t value, int bytes); /* little-endian */
void gguf_put_string(struct strbuf *out, const char *s);

/* Metadata. */
void gguf_add_key(struct gguf_builder *b, const char *key, uint32_t kind); /* value follows */
void gguf_add_u32(struct gguf_builder *b, const char *key, uint32_t value);
void gguf_add_f32(struct gguf_builder *b, const char *key, float value);
void gguf_add_string(struct gguf_builder *b, const char *key, const char *value);

/* A tensor's description; dims innermost first, as the file has them. */
void gguf_add_tensor(struct gguf_builder *b, const char *name, uint32_t rank, const uint64_t *dims,
                     uint32_t type, uint64_t offset);
/* Pads the data to 32 and returns where the next tensor's go; append to b->data. */
uint64_t gguf_next_offset(struct gguf_builder *b);

/* The whole file, version 3; malloc'ed with not a byte to spare. */
unsigned char *gguf_build(const struct gguf_builder *b, size_t *len);

#endif
