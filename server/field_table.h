/* field_table.h: what becomes of each field of a request, one table per resource.
 *
 * Each field of the contract is honoured, accepted without effect (with the reason), or refused by
 * name (with the reason); a field that is in no table is refused as unknown. The validators walk
 * these tables, api-spec/fields.md is printed from them, and a test holds both to the contract's
 * schema. A field is named by its path: "method.supervised.hyperparameters.n_epochs". */
#ifndef GRAFT_FIELD_TABLE_H
#define GRAFT_FIELD_TABLE_H

#include <jansson.h>
#include <stddef.h>

#include "engine/base/err.h"
#include "engine/base/strbuf.h"

enum field_use { FIELD_HONOURED, FIELD_ACCEPTED, FIELD_REFUSED };

struct field {
    const char *path;
    enum field_use use;
    /* FIELD_REFUSED: the one value that means "without it" and is let through, as JSON; null and
     * absence always are. NULL: none. */
    const char *neutral;
    const char *note; /* why it is without effect or refused; of our own fields, what it does */
};

struct field_table {
    const char *resource; /* the schema's name in the contract */
    const char *route;    /* "POST /v1/files" */
    const struct field *fields;
    size_t count;
};

extern const struct field_table field_table_files, field_table_jobs, field_table_chat,
    field_table_deltas;
extern const struct field_table *const field_tables[];
extern const size_t field_table_count;

const struct field *field_table_find(const struct field_table *table, const char *path);

/* Refuses unknown and refused fields of `object`, nested ones too, by name:
 * "Unknown parameter: 'x'." (code unknown_parameter, param x), code unsupported_parameter. Types
 * and bounds are the validators' business; an object where the table knows no children is not
 * entered. */
int field_table_check(const struct field_table *table, const json_t *object, struct err *err);
/* One name without a value (a multipart field): the same errors. */
int field_table_check_name(const struct field_table *table, const char *path, struct err *err);

/* api-spec/fields.md */
void field_table_render(struct strbuf *out);

#endif
