/* The facade of engine.h: opening and closing an engine and its parts. What works on an open engine
 * is in dataset.c, trainer.c, session.c, recall.c, adapter.c and codec/. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/backend.h"
#include "engine/base_file.h"
#include "engine/chat_template.h"
#include "engine/engine_parts.h"
#include "engine/model.h"
#include "engine/tokenizer.h"

/* The text side: tokenizer and template, from inside the base. */
static int open_text(struct engine *engine, struct err *err)
{
    int32_t vocabulary = base_file_config(engine->base)->vocabulary;
    const char *text;
    size_t len;

    text = base_file_tokenizer_json(engine->base, &len);
    if (tokenizer_open(&engine->tokenizer, text, len, err) != 0)
        return -1;
    if (tokenizer_size(engine->tokenizer) > vocabulary)
        return err_set(err, ERR_INVALID,
                       "the tokenizer has %d tokens, the model only %d: they do not belong "
                       "together",
                       tokenizer_size(engine->tokenizer), vocabulary);
    text = base_file_chat_template(engine->base, &len);
    return chat_template_open(&engine->chat_template, text, len, engine->tokenizer, err);
}

/* ------------------------------------------------------------------ precision */

int engine_precision_parse(const char *text, enum engine_precision *out, struct err *err)
{
    static const char *const names[] = {"auto", "f32", "bf16"};

    for (int i = 0; i < 3; i++)
        if (strcmp(text, names[i]) == 0) {
            *out = (enum engine_precision)i;
            return 0;
        }
    return err_set(err, ERR_INVALID, "\"%.32s\" is no precision: auto, f32 or bf16", text);
}

static enum dtype precision_of(const struct engine_options *o)
{
    bool cuda = o->device != NULL && strncmp(o->device, "cuda", 4) == 0;

    if (o->precision == ENGINE_PRECISION_AUTO)
        return cuda ? DTYPE_BF16 : DTYPE_F32;
    return o->precision == ENGINE_PRECISION_BF16 ? DTYPE_BF16 : DTYPE_F32;
}

int64_t engine_weight_bytes(const struct engine_base_info *info,
                            const struct engine_options *options)
{
    return info->parameters * dtype_size(precision_of(options));
}

/* ------------------------------------------------------------------ engine */

int engine_open(struct engine **out, const char *base_path, const struct engine_options *options,
                struct err *err)
{
    const struct backend_options backend = {
        .device = options->device, .precision = precision_of(options), .threads = options->threads};
    struct engine *engine = calloc(1, sizeof(*engine));

    if (engine == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory for an engine");
    engine->backend = calloc(1, sizeof(*engine->backend));
    if (engine->backend == NULL) {
        err_set(err, ERR_NO_MEMORY, "out of memory for an engine");
        goto fail;
    }
    engine->threads = options->threads;
    if (base_file_open(&engine->base, base_path, err) != 0 || open_text(engine, err) != 0 ||
        backend_open(engine->backend, &backend, err) != 0 ||
        model_open(&engine->model, engine->backend, engine->base, err) != 0)
        goto fail;
    *out = engine;
    return 0;
fail:
    engine_free(engine);
    return -1;
}

int engine_base_path(char path[ENGINE_PATH_MAX], const char *model, bool *temporary,
                     struct err *err)
{
    struct engine_base_info info;
    int fd;

    *temporary = false;
    if (engine_base_read(model, &info, NULL) == 0) {
        if (snprintf(path, ENGINE_PATH_MAX, "%s", model) < ENGINE_PATH_MAX)
            return 0;
        return err_set(err, ERR_INVALID, "the path of the model is too long");
    }
    snprintf(path, ENGINE_PATH_MAX, P_tmpdir "/graft-base-XXXXXX");
    fd = mkstemp(path);
    if (fd < 0)
        return err_set(err, ERR_IO, "no temporary file can be made at %s: %s", path,
                       strerror(errno));
    close(fd);
    *temporary = true;
    if (engine_import(model, path, &info, err) == 0)
        return 0;
    unlink(path);
    return -1;
}

int engine_open_model(struct engine **out, const char *path, const struct engine_options *options,
                      struct err *err)
{
    char base[ENGINE_PATH_MAX];
    bool temporary;
    int rc;

    if (engine_base_path(base, path, &temporary, err) != 0)
        return -1;
    rc = engine_open(out, base, options, err);
    if (temporary) {
        unlink(base);
    } else if (rc == 0 && base_file_verify((*out)->base, err) != 0) {
        rc = err_prefix(err, "%s", path);
        engine_free(*out);
        *out = NULL;
    }
    return rc;
}

void engine_free(struct engine *engine)
{
    if (engine == NULL)
        return;
    model_free(engine->model);
    if (engine->backend != NULL)
        backend_close(engine->backend);
    free(engine->backend);
    chat_template_free(engine->chat_template);
    tokenizer_free(engine->tokenizer);
    base_file_free(engine->base);
    free(engine);
}

const struct engine_base_info *engine_info(const struct engine *engine)
{
    return base_file_info(engine->base);
}

bool engine_memory(const struct engine *engine, int64_t *bytes, int64_t *bytes_free)
{
    struct backend *backend = engine->backend;

    if (backend->ops->memory == NULL)
        return false;
    backend->ops->memory(backend, bytes, bytes_free);
    return true;
}
