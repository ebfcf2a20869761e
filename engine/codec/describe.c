/* engine_delta_describe: what a delta file says of itself, without its base. */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/engine.h"
#include "engine/safetensors.h"

#define KEY_PREFIX "graft."

static int add_metadata(json_t *out, const struct safetensors *file)
{
    static const char *const keys[] = {"version", "base", "codec", "created_by"};
    const char *report = safetensors_metadata(file, KEY_PREFIX "report");
    json_t *parsed;

    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        char key[32];
        const char *value;

        snprintf(key, sizeof key, KEY_PREFIX "%s", keys[i]);
        value = safetensors_metadata(file, key);
        if (json_object_set_new(out, keys[i], value ? json_string(value) : json_null()))
            return -1;
    }
    parsed = report ? json_loads(report, 0, NULL) : NULL; /* as a stranger wrote it */
    return json_object_set_new(out, "report", parsed ? parsed : json_null());
}

/* {"name", "dtype", "shape", "bytes"} of each tensor in the file. */
static int add_tensors(json_t *out, const struct safetensors *file, int64_t *bytes)
{
    json_t *list = json_array();

    for (int64_t i = 0; i < safetensors_count(file); i++) {
        const struct safetensors_tensor *t = safetensors_at(file, i);
        json_t *shape = json_array(), *one;

        for (int d = 0; d < t->view.rank; d++)
            json_array_append_new(shape, json_integer(t->view.shape[d]));
        one = json_pack("{s:s, s:s, s:o, s:I}", "name", t->name, "dtype", dtype_name(t->view.dtype),
                        "shape", shape, "bytes", (json_int_t)t->bytes);
        *bytes += t->bytes;
        if (!one || json_array_append_new(list, one)) {
            json_decref(list);
            return -1;
        }
    }
    return json_object_set_new(out, "tensors", list);
}

int engine_delta_describe(const char *path, char **json, struct err *err)
{
    struct safetensors *file;
    const char *format;
    json_t *out;
    int64_t bytes = 0;

    *json = NULL;
    if (safetensors_open(&file, path, err))
        return -1;
    format = safetensors_metadata(file, KEY_PREFIX "format");
    if (!format || strcmp(format, "delta") != 0) {
        safetensors_free(file);
        return err_set(err, ERR_INVALID, "\"%s\" is not a delta: its metadata do not say so", path);
    }
    out = json_object();
    if (out && add_metadata(out, file) == 0 && add_tensors(out, file, &bytes) == 0 &&
        json_object_set_new(out, "tensor_bytes", json_integer(bytes)) == 0)
        *json = json_dumps(out, JSON_COMPACT | JSON_REAL_PRECISION(6));
    json_decref(out);
    safetensors_free(file);
    return *json ? 0 : err_set(err, ERR_NO_MEMORY, "no memory to describe a delta");
}
