/* One value of a header's metadata replaced: the header is parsed, written anew and put where it
 * stood. Compact, as it is written, it is never longer than it was, but for the value. */
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/file_io.h"
#include "engine/base/json_text.h"
#include "engine/safetensors.h"

enum { HEADER_AT = 8 }; /* behind its length */

/* A reference to the header's JSON; NULL unless the file is sound and has the key. */
static json_t *load_header(const struct file_map *map, const char *path, const char *key,
                           size_t *len, struct err *err)
{
    struct safetensors *file;
    uint64_t n;
    bool found;

    if (safetensors_open_memory(&file, map->data, map->len, path, err) != 0)
        return NULL;
    found = safetensors_metadata(file, key) != NULL;
    safetensors_free(file);
    if (!found) {
        err_set(err, ERR_INVALID, "%s: there is no metadata \"%.64s\" to replace", path, key);
        return NULL;
    }
    memcpy(&n, map->data, sizeof n);
    *len = (size_t)n;
    return json_text_load((const char *)map->data + HEADER_AT, *len, 0, err);
}

/* The header with the new value, blanks up to `room` bytes; malloc'ed. */
static char *spell(json_t *header, const char *path, const char *key, const char *value,
                   size_t room, struct err *err)
{
    json_t *string = json_string(value);
    char *text = NULL, *padded = NULL;
    size_t len;

    if (string == NULL) {
        err_set(err, ERR_INVALID, "%s: metadata \"%.64s\" is not UTF-8", path, key);
        return NULL;
    }
    if (json_object_set_new(json_object_get(header, "__metadata__"), key, string) == 0)
        text = json_dumps(header, JSON_COMPACT);
    len = text != NULL ? strlen(text) : 0;
    if (len > room) {
        err_set(err, ERR_INVALID,
                "%s: metadata \"%.64s\" would take the header to %zu bytes where there is room for "
                "%zu",
                path, key, len, room);
        free(text);
        return NULL;
    }
    if (text != NULL)
        padded = realloc(text, room + 1);
    if (padded == NULL) {
        free(text);
        err_set(err, ERR_NO_MEMORY, "write %s: out of memory", path);
        return NULL;
    }
    memset(padded + len, ' ', room - len);
    return padded;
}

static int overwrite(const char *path, const char *text, size_t len, struct err *err)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC), rc;

    if (fd < 0)
        return err_set_errno(err, errno, "open %s", path);
    if (lseek(fd, HEADER_AT, SEEK_SET) != HEADER_AT)
        rc = err_set_errno(err, errno, "write %s", path);
    else if ((rc = file_write_full(fd, text, len, path, err)) == 0)
        rc = file_sync(fd, path, err);
    close(fd);
    return rc;
}

int safetensors_patch_metadata(const char *path, const char *key, const char *value,
                               struct err *err)
{
    struct file_map map;
    json_t *header;
    char *text = NULL;
    size_t room = 0;
    int rc = -1;

    if (file_map_open(&map, path, err) != 0)
        return -1;
    header = load_header(&map, path, key, &room, err);
    if (header != NULL)
        text = spell(header, path, key, value, room, err);
    json_decref(header);
    file_map_close(&map);
    if (text != NULL)
        rc = overwrite(path, text, room, err);
    free(text);
    return rc;
}
