#include "storage/db_result.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

struct db_result {
    PGresult *res;
};

int db_result_wrap(PGresult *res, struct db_result **out, struct err *err)
{
    struct db_result *result = malloc(sizeof *result);

    *out = result;
    if (result == NULL) {
        PQclear(res);
        return err_set(err, ERR_NO_MEMORY, "database: out of memory");
    }
    result->res = res;
    return 0;
}

void db_result_free(struct db_result *result)
{
    if (result == NULL)
        return;
    PQclear(result->res);
    free(result);
}

int db_rows(const struct db_result *result)
{
    return PQntuples(result->res);
}

int64_t db_affected(const struct db_result *result)
{
    return strtoll(PQcmdTuples(result->res), NULL, 10);
}

bool db_is_null(const struct db_result *result, int row, int column)
{
    assert(row < PQntuples(result->res) && column < PQnfields(result->res));
    return PQgetisnull(result->res, row, column) != 0;
}

const char *db_text(const struct db_result *result, int row, int column)
{
    return db_is_null(result, row, column) ? NULL : PQgetvalue(result->res, row, column);
}

char *db_text_copy(const struct db_result *result, int row, int column)
{
    const char *text = db_text(result, row, column);

    return text != NULL ? strdup(text) : NULL;
}

int64_t db_int(const struct db_result *result, int row, int column)
{
    const char *text = db_text(result, row, column);

    return text != NULL ? strtoll(text, NULL, 10) : 0;
}

double db_real(const struct db_result *result, int row, int column)
{
    const char *text = db_text(result, row, column);

    return text != NULL ? strtod(text, NULL) : NAN;
}

bool db_bool(const struct db_result *result, int row, int column)
{
    const char *text = db_text(result, row, column);

    return text != NULL && text[0] == 't';
}

void db_text_into(const struct db_result *result, int row, int column, char *out, size_t size)
{
    const char *text = db_text(result, row, column);
    size_t len = text != NULL ? strlen(text) : 0;

    assert(len < size);
    if (text != NULL)
        memcpy(out, text, len);
    out[len] = '\0';
}
