#include "tests/unit/stored_model.h"

#include <stdio.h>

#include "engine/base/file_io.h"
#include "tests/unit/check.h"
#include "tests/unit/noisy_delta.h"

void stored_base(struct stored_file *out, const char *source, const char *folder, const char *name)
{
    snprintf(out->path, sizeof out->path, "%s/%s", folder, name);
    CHECK(engine_import(source, out->path, NULL, &err));
    CHECK(file_sha256(out->path, out->sha256, NULL, &err));
}

void stored_deltas(struct stored_file *out, int count, struct engine *engine, const char *codec,
                   const char *folder)
{
    for (int i = 0; i < count; i++) {
        const struct noisy_delta noise = {.codec = codec, .seed = 20 + (uint64_t)i};

        snprintf(out[i].path, sizeof out[i].path, "%s/delta%d", folder, i);
        CHECK(noisy_delta_write(engine, &noise, out[i].path, &err));
        CHECK(file_sha256(out[i].path, out[i].sha256, NULL, &err));
    }
}

struct engine *stored_engine(const struct stored_file *base)
{
    const struct engine_options options = {.device = "cpu", .threads = 1};
    struct engine *engine;

    CHECK(engine_open(&engine, base->path, &options, &err));
    return engine;
}
