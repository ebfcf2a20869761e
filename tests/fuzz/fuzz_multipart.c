/* multipart.h under libFuzzer. First line of the input: the Content-Type; the rest: the body, which
 * is read whole, in two pieces and byte by byte. All three must say the same. */
#include <assert.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/sha256.h"
#include "server/multipart.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct trace {
    struct sha256 *hash;
    size_t bytes;
};

static int on_part(void *context, const struct multipart_part *part, struct err *err)
{
    struct trace *trace = context;
    assert(part->name[0] && strlen(part->name) <= MULTIPART_NAME_MAX);
    sha256_update(trace->hash, "P", 1);
    sha256_update(trace->hash, part->name, strlen(part->name) + 1);
    sha256_update(trace->hash, part->file_name, strlen(part->file_name) + 1);
    sha256_update(trace->hash, part->content_type, strlen(part->content_type) + 1);
    return 0;
}

static int on_data(void *context, const char *bytes, size_t len, struct err *err)
{
    struct trace *trace = context;
    sha256_update(trace->hash, bytes, len);
    trace->bytes += len;
    return 0;
}

static int on_part_end(void *context, struct err *err)
{
    struct trace *trace = context;
    sha256_update(trace->hash, "E", 1);
    return 0;
}

static int run(const char *type, const char *body, size_t len, size_t piece, char hex[SHA256_HEX])
{
    struct trace trace = {.hash = sha256_new()};
    const struct multipart_events events = {on_part, on_data, on_part_end, &trace};
    struct multipart mp;
    int rc = multipart_init(&mp, type, &events, NULL);
    for (size_t i = 0; i < len && rc == 0; i += piece)
        rc = multipart_feed(&mp, body + i, len - i < piece ? len - i : piece, NULL);
    if (rc == 0)
        rc = multipart_end(&mp, NULL);
    multipart_release(&mp);
    assert(trace.bytes <= len);
    sha256_final_hex(trace.hash, hex);
    sha256_free(trace.hash);
    return rc;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const char *newline = memchr(data, '\n', size);
    size_t type_len = newline ? (size_t)(newline - (const char *)data) : size;
    char type[300];
    if (type_len >= sizeof(type))
        return 0;
    memcpy(type, data, type_len);
    type[type_len] = '\0';
    size_t body_len = newline ? size - type_len - 1 : 0;
    const char *body = newline ? newline + 1 : "";
    char whole[SHA256_HEX], halves[SHA256_HEX], bytes[SHA256_HEX];
    int rc = run(type, body, body_len, body_len + 1, whole);
    assert(run(type, body, body_len, body_len / 2 + 1, halves) == rc);
    assert(run(type, body, body_len, 1, bytes) == rc);
    if (rc == 0)
        assert(strcmp(whole, halves) == 0 && strcmp(whole, bytes) == 0);
    return 0;
}
