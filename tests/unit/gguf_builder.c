#include "tests/unit/gguf_builder.h"

#include <stdlib.h>
#include <string.h>

void gguf_builder_init(struct gguf_builder *b)
{
    *b = (struct gguf_builder){0};
    strbuf_init(&b->entries, 1 << 26);
    strbuf_init(&b->tensors, 1 << 26);
    strbuf_init(&b->data, 1 << 28);
}

void gguf_builder_release(struct gguf_builder *b)
{
    strbuf_release(&b->entries);
    strbuf_release(&b->tensors);
    strbuf_release(&b->data);
}

void gguf_put_int(struct strbuf *out, uint64_t value, int bytes)
{
    for (int i = 0; i < bytes; i++)
        strbuf_addch(out, (char)(value >> (8 * i)));
}

void gguf_put_string(struct strbuf *out, const char *s)
{
    gguf_put_int(out, strlen(s), 8);
    strbuf_addstr(out, s);
}

void gguf_add_key(struct gguf_builder *b, const char *key, uint32_t kind)
{
    gguf_put_string(&b->entries, key);
    gguf_put_int(&b->entries, kind, 4);
    b->entry_count++;
}

void gguf_add_u32(struct gguf_builder *b, const char *key, uint32_t value)
{
    gguf_add_key(b, key, 4);
    gguf_put_int(&b->entries, value, 4);
}

void gguf_add_f32(struct gguf_builder *b, const char *key, float value)
{
    gguf_add_key(b, key, 6);
    strbuf_add(&b->entries, &value, sizeof value);
}

void gguf_add_string(struct gguf_builder *b, const char *key, const char *value)
{
    gguf_add_key(b, key, 8);
    gguf_put_string(&b->entries, value);
}

void gguf_add_tensor(struct gguf_builder *b, const char *name, uint32_t rank, const uint64_t *dims,
                     uint32_t type, uint64_t offset)
{
    gguf_put_string(&b->tensors, name);
    gguf_put_int(&b->tensors, rank, 4);
    for (uint32_t i = 0; i < rank; i++)
        gguf_put_int(&b->tensors, dims[i], 8);
    gguf_put_int(&b->tensors, type, 4);
    gguf_put_int(&b->tensors, offset, 8);
    b->tensor_count++;
}

uint64_t gguf_next_offset(struct gguf_builder *b)
{
    while (b->data.len % 32 != 0)
        strbuf_addch(&b->data, '\0');
    return b->data.len;
}

unsigned char *gguf_build(const struct gguf_builder *b, size_t *len)
{
    struct strbuf out;
    unsigned char *exact;

    strbuf_init(&out, (size_t)1 << 29);
    strbuf_addstr(&out, "GGUF");
    gguf_put_int(&out, 3, 4);
    gguf_put_int(&out, b->tensor_count, 8);
    gguf_put_int(&out, b->entry_count, 8);
    strbuf_add(&out, b->entries.data, b->entries.len);
    strbuf_add(&out, b->tensors.data, b->tensors.len);
    if (b->data.len > 0) {
        while (out.len % 32 != 0)
            strbuf_addch(&out, '\0');
        strbuf_add(&out, b->data.data, b->data.len);
    }
    *len = out.len;
    exact = malloc(out.len);
    memcpy(exact, out.data, out.len);
    strbuf_release(&out);
    return exact;
}
