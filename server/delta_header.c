#include "server/delta_header.h"

#include <jansson.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "engine/base/file_io.h"
#include "engine/base/json_text.h"

#define HEADER_MAX \
    (4u << 20) /* of the largest models it is 200 kB; JSON takes many times its text */

static int invalid(struct err *err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static int invalid(struct err *err, const char *fmt, ...)
{
    char text[256];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    return err_set_code(err, ERR_INVALID, "invalid_delta", "file",
                        "The file is not a delta that can be used here: %s.", text);
}

/* The header's JSON: 8 bytes of length, little-endian, then so many bytes. NULL: ERR_INVALID. */
static json_t *parse(const struct file_map *map, struct err *err)
{
    uint64_t len = 0;
    struct err why = {0};
    if (map->len < 8) {
        invalid(err, "it is too short to be a safetensors file");
        return NULL;
    }
    for (int i = 7; i >= 0; i--)
        len = len << 8 | map->data[i];
    if (len > HEADER_MAX || len > map->len - 8) {
        invalid(err, "it is not a safetensors file, or cut off");
        return NULL;
    }
    json_t *header = json_text_load((const char *)map->data + 8, (size_t)len, 0, &why);
    if (!header)
        invalid(err, "its safetensors header is not JSON (%.120s)", why.message);
    return header;
}

static const char *get(const json_t *metadata, const char *key)
{
    const char *text = json_string_value(json_object_get(metadata, key));
    return text ? text : "";
}

static int check(const json_t *metadata, struct delta_header *out, struct err *err)
{
    const char *base = get(metadata, "graft.base");
    if (strcmp(get(metadata, "graft.format"), "delta") != 0)
        return invalid(err, "its metadata do not say graft.format \"delta\"");
    if (strlen(base) != 64 || base[strspn(base, "0123456789abcdef")])
        return invalid(err, "graft.base is not a digest of 64 lower-case hex digits");
    snprintf(out->base, sizeof(out->base), "%s", base);
    return 0;
}

int delta_header_read(const char *path, struct delta_header *out, struct err *err)
{
    struct file_map map = {0};
    json_t *header = NULL;
    int rc = -1;
    memset(out, 0, sizeof(*out));
    if (file_map_open(&map, path, err) < 0)
        return -1;
    header = parse(&map, err);
    if (header)
        rc = check(json_object_get(header, "__metadata__"), out, err);
    json_decref(header);
    file_map_close(&map);
    return rc;
}
