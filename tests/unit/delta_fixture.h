/* delta_fixture.h: a delta file made from any source of values, for tests. */
#ifndef GRAFT_TESTS_DELTA_FIXTURE_H
#define GRAFT_TESTS_DELTA_FIXTURE_H

#include "engine/codec/compression.h"

#define DELTA_FIXTURE_NAME 32

struct delta_fixture {
    int64_t bytes;         /* of the file */
    double relative_error; /* of all that changed */
};

/* `bytes`: how large it may be; 0: as large as it likes. `report`: its metadata, or NULL. */
int delta_fixture_write(const struct artifact_source *source, const char *codec, int64_t bytes,
                        const char *report, const char *path, struct delta_fixture *out,
                        struct err *err);

/* Name of codec `index`, as all there are are tested; false: there are not so many. */
bool delta_fixture_codec(int index, char name[DELTA_FIXTURE_NAME]);
/* The same of those that make a delta of any difference, which are the first. */
bool delta_fixture_maker(int index, char name[DELTA_FIXTURE_NAME]);
/* It takes a size that it is given. */
bool delta_fixture_sizes(const char *codec);

#endif
