/* engine_parts.h: what an open engine is made of, for the modules of the engine itself (trainer,
 * session, recall, codecs). engine.c opens and frees the parts; nobody else keeps one longer than
 * the engine lives. */
#ifndef GRAFT_ENGINE_PARTS_H
#define GRAFT_ENGINE_PARTS_H

#include <stdint.h>

#include "engine/engine.h"

struct base_file;
struct tokenizer;
struct chat_template;
struct backend;
struct model;

struct engine {
    struct base_file *base;
    struct tokenizer *tokenizer;
    struct chat_template *chat_template;
    struct backend *backend;
    struct model *model; /* the base's weights on the backend; read-only */
    int threads;         /* of the backend's pool */
};

/* The base file of a model at `model`: itself, or (temporary, to be unlinked by the caller) one
 * that it was imported to. */
#define ENGINE_PATH_MAX 1024
int engine_base_path(char path[ENGINE_PATH_MAX], const char *model, bool *temporary,
                     struct err *err);

#endif
