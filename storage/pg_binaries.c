#include "storage/pg_binaries.h"

#include <glob.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/strbuf.h"

/* "postgres (PostgreSQL) 15.20 (Debian …)" → 15; 0 where it does not run or says something else. */
static int ask_major(const char *dir)
{
    char command[700], line[256] = "";
    int major = 0;
    FILE *pipe;

    if (strchr(dir, '\'') != NULL)
        return 0;
    snprintf(command, sizeof command, "'%s/postgres' --version 2>/dev/null", dir);
    pipe = popen(command, "re");
    if (pipe == NULL)
        return 0;
    if (fgets(line, sizeof line, pipe) == NULL ||
        sscanf(line, "postgres (PostgreSQL) %d", &major) != 1)
        major = 0;
    pclose(pipe);
    return major;
}

static void consider(const char *dir, int wanted, struct pg_binaries *best, struct strbuf *seen)
{
    char path[600];
    int major;

    if (strlen(dir) >= sizeof best->dir)
        return;
    snprintf(path, sizeof path, "%s/initdb", dir);
    if (access(path, X_OK) != 0)
        return;
    snprintf(path, sizeof path, "%s/postgres", dir);
    if (access(path, X_OK) != 0 || (major = ask_major(dir)) == 0)
        return;
    strbuf_addf(seen, "%s%d in %s", seen->len > 0 ? ", " : "", major, dir);
    if (wanted != 0 ? major != wanted : major < PG_OLDEST_MAJOR)
        return;
    if (major <= best->major)
        return;
    best->major = major;
    snprintf(best->dir, sizeof best->dir, "%s", dir);
}

static void consider_known(int wanted, struct pg_binaries *best, struct strbuf *seen)
{
    static const char *const patterns[] = {"/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin",
                                           "/usr/local/pgsql/bin", "/usr/lib/postgresql*/bin"};

    for (size_t i = 0; i < sizeof patterns / sizeof *patterns; i++) {
        glob_t found;

        if (glob(patterns[i], 0, NULL, &found) == 0)
            for (size_t k = 0; k < found.gl_pathc; k++)
                consider(found.gl_pathv[k], wanted, best, seen);
        globfree(&found);
    }
}

/* The shell knows the PATH; this code reads no environment. */
static void consider_path(int wanted, struct pg_binaries *best, struct strbuf *seen)
{
    FILE *pipe = popen("p=$(command -v postgres) && dirname \"$(readlink -f \"$p\")\"; "
                       "pg_config --bindir 2>/dev/null",
                       "re");
    char line[512];

    if (pipe == NULL)
        return;
    while (fgets(line, sizeof line, pipe) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        if (line[0] == '/')
            consider(line, wanted, best, seen);
    }
    pclose(pipe);
}

int pg_binaries_find(int wanted, struct pg_binaries *out, struct err *err)
{
    struct strbuf seen;
    int rc = 0;

    *out = (struct pg_binaries){0};
    strbuf_init(&seen, 800);
    consider_known(wanted, out, &seen);
    if (out->major == 0)
        consider_path(wanted, out, &seen);
    if (out->major == 0 && wanted != 0)
        rc = err_set(err, ERR_INVALID,
                     "the data directory was made by PostgreSQL %d, which is not installed here "
                     "(found: %s): install it (Debian: apt install postgresql-%d), or move the "
                     "data with that version's pg_dump into a new data directory",
                     wanted, seen.len > 0 ? seen.data : "none", wanted);
    else if (out->major == 0)
        rc = err_set(err, ERR_INVALID,
                     "PostgreSQL %d or later is not installed here (found: %s): install it "
                     "(Debian, Ubuntu: apt install postgresql), or give a database URL",
                     PG_OLDEST_MAJOR, seen.len > 0 ? seen.data : "none");
    strbuf_release(&seen);
    return rc;
}
