/* One value of a header, replaced where it stands. The reader has found the file sound before the
 * text is looked through here; the bounds are held to all the same. */
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/file_io.h"
#include "engine/base/json_text.h"
#include "engine/safetensors.h"

/* What is left of a JSON text, or a part of it. */
struct text {
    const char *at, *end;
};

/* Of the file. */
struct place {
    off_t offset;
    size_t room;
};

static bool is_blank(char c)
{
    return c == ' ' || c == '\t' || c == '\n' || c == '\r';
}

static void skip_blanks(struct text *t)
{
    while (t->at < t->end && is_blank(*t->at))
        t->at++;
}

static bool skip_char(struct text *t, char c)
{
    skip_blanks(t);
    if (t->at == t->end || *t->at != c)
        return false;
    t->at++;
    return true;
}

static bool skip_string(struct text *t)
{
    if (!skip_char(t, '"'))
        return false;
    for (; t->at < t->end && *t->at != '"'; t->at++)
        t->at += *t->at == '\\' && t->end - t->at > 1;
    return skip_char(t, '"');
}

/* A value of any kind; *out: its text alone. */
static bool take_value(struct text *t, struct text *out)
{
    int depth = 0;

    skip_blanks(t);
    out->at = t->at;
    do {
        if (t->at == t->end)
            return false;
        if (*t->at == '"') {
            if (!skip_string(t))
                return false;
            continue;
        }
        depth += (*t->at == '{' || *t->at == '[') - (*t->at == '}' || *t->at == ']');
        t->at++;
    } while (depth > 0 || (t->at < t->end && !is_blank(*t->at) && !strchr(",:]}", *t->at)));
    out->end = t->at;
    return true;
}

/* A key may be spelt with escapes. */
static bool is_key(struct text spelt, const char *key)
{
    json_t *string =
        json_text_load(spelt.at, (size_t)(spelt.end - spelt.at), JSON_DECODE_ANY, NULL);
    bool same = json_is_string(string) && strcmp(json_string_value(string), key) == 0;

    json_decref(string);
    return same;
}

/* *out: the text of a member's value in an object; its end is that of the blanks behind it. */
static bool find_member(struct text object, const char *key, struct text *out)
{
    struct text spelt;

    if (!skip_char(&object, '{'))
        return false;
    do {
        if (!take_value(&object, &spelt) || !skip_char(&object, ':') || !take_value(&object, out))
            return false;
        if (is_key(spelt, key)) {
            skip_blanks(&object);
            out->end = object.at;
            return true;
        }
    } while (skip_char(&object, ','));
    return false;
}

static int find(const struct file_map *map, const char *path, const char *key, struct place *out,
                struct err *err)
{
    const char *data = (const char *)map->data;
    struct safetensors *file;
    struct text metadata, value;
    bool found;

    if (safetensors_open_memory(&file, data, map->len, path, err) != 0)
        return -1;
    found = safetensors_metadata(file, key) != NULL;
    safetensors_free(file);
    /* The data behind the header is never reached: the object ends before. */
    if (!found ||
        !find_member((struct text){data + 8, data + map->len}, "__metadata__", &metadata) ||
        !find_member(metadata, key, &value))
        return err_set(err, ERR_INVALID, "%s: there is no metadata \"%.64s\" to replace", path,
                       key);
    out->offset = value.at - data;
    out->room = (size_t)(value.end - value.at);
    return 0;
}

static int overwrite(const char *path, off_t offset, const char *text, size_t len, struct err *err)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC), rc;

    if (fd < 0)
        return err_set_errno(err, errno, "open %s", path);
    if (lseek(fd, offset, SEEK_SET) != offset)
        rc = err_set_errno(err, errno, "write %s", path);
    else if ((rc = file_write_full(fd, text, len, path, err)) == 0)
        rc = file_sync(fd, path, err);
    close(fd);
    return rc;
}

/* With its quotes and escapes; malloc'ed. */
static char *spell(const char *value)
{
    json_t *string = json_string(value);
    char *text = string != NULL ? json_dumps(string, JSON_ENCODE_ANY) : NULL;

    json_decref(string);
    return text;
}

int safetensors_patch_metadata(const char *path, const char *key, const char *value,
                               struct err *err)
{
    struct file_map map;
    struct place place = {0};
    char *text, *padded;
    size_t len;
    int rc;

    if (file_map_open(&map, path, err) != 0)
        return -1;
    rc = find(&map, path, key, &place, err);
    file_map_close(&map);
    if (rc != 0)
        return -1;
    text = spell(value);
    if (text == NULL)
        return err_set(err, ERR_INVALID, "%s: metadata \"%.64s\" is not UTF-8", path, key);
    len = strlen(text);
    if (len > place.room) {
        free(text);
        return err_set(err, ERR_INVALID,
                       "%s: metadata \"%.64s\" would take %zu bytes where there is room for %zu",
                       path, key, len, place.room);
    }
    padded = realloc(text, place.room + 1);
    if (padded == NULL) {
        free(text);
        return err_set(err, ERR_NO_MEMORY, "write %s: out of memory", path);
    }
    memset(padded + len, ' ', place.room - len);
    rc = overwrite(path, place.offset, padded, place.room, err);
    free(padded);
    return rc;
}
