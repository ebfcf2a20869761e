/* taught_model.h: a tiny model that was taught twelve answers, and what compresses it, for tests.
 */
#ifndef GRAFT_TESTS_TAUGHT_MODEL_H
#define GRAFT_TESTS_TAUGHT_MODEL_H

#include <jansson.h>

#include "engine/engine.h"
#include "tests/unit/check.h"

struct taught_model {
    char folder[64];
    /* In the folder; `tuned_dir` is a model tuned elsewhere, the next two are the test's. */
    char base_path[128], tuned_dir[128], delta_path[128], other_path[128];
    struct engine *engine;
    struct engine_dataset *questions, *reworded; /* twelve rows each, the first were taught */
    struct engine_trainer *trainer;
};
extern struct taught_model taught;

int taught_setup(void **state); /* of a cmocka group */
int taught_teardown(void **state);

/* To be freed by the caller. */
struct engine *taught_engine(const char *base, int threads);
/* The first `count` questions in another wording. */
void taught_rows(struct engine_dataset **out, const char *wording, int count);
/* What was learnt, to delta_path. */
struct engine_delta_report taught_compress(struct engine_compress_options options);
/* The report that the file at `path` carries, to be released; it says what the caller was told,
 * with a KL measured on `on`. */
json_t *taught_report(const char *path);
void taught_expect_report(const char *path, const struct engine_delta_report *report,
                          const char *on);
/* No draft is in the folder, nor anything else beside delta_path that was to become it. */
void taught_nothing_is_left(void);
/* A file at delta_path that was there before; it still is. */
void taught_put_older(void);
void taught_expect_older(void);

/* What a listener was told; it may say stop. */
struct taught_progress {
    char stage[32];
    double share;
    int stages;
    const char *stop; /* at the first word of this stage; NULL: not at all */
    int rounds;       /* of the stage that go by before */
    int after;        /* words told after that */
};
bool taught_on_progress(void *context, const char *stage, double share);

#endif
