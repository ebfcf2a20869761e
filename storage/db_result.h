/* db_result.h: what db.c needs of db_result.c; everyone else uses the getters of db.h. */
#ifndef GRAFT_STORAGE_DB_RESULT_H
#define GRAFT_STORAGE_DB_RESULT_H

#include <libpq-fe.h>

#include "storage/db.h"

/* Takes `res` over, also on failure. */
int db_result_wrap(PGresult *res, struct db_result **out, struct err *err);

#endif
