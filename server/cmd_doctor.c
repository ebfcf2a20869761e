/* `graft doctor`: what this machine has for Graft, what is missing, and what to do about it. Makes
 * and migrates nothing; a private database that is there already is started for a moment if no
 * server runs. */
#include <errno.h>
#include <jansson.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/base/file_io.h"
#include "server/capacity.h"
#include "server/cmd.h"
#include "server/devices.h"
#include "storage/bases.h"
#include "storage/db.h"
#include "storage/pg_binaries.h"
#include "storage/pg_cluster.h"

#define LOW_DISK (INT64_C(4) << 30)   /* a small base and a few jobs */
#define LOW_MEMORY (INT64_C(2) << 30) /* a base of 0.1B parameters, trained */
#define GIB(bytes) ((double)(bytes) / (double)(INT64_C(1) << 30))

enum level { LEVEL_OK, LEVEL_WARN, LEVEL_FAIL };
static const char *const level_names[] = {"ok", "warn", "fail"};

struct doctor {
    const struct settings *settings;
    bool json;
    json_t *checks;
    int count[3]; /* by level */
};

static void say(struct doctor *d, enum level level, const char *check, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
static void say(struct doctor *d, enum level level, const char *check, const char *fmt, ...)
{
    char text[1200];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    d->count[level]++;
    if (d->json)
        json_array_append_new(d->checks, json_pack("{s:s, s:s, s:s}", "level", level_names[level],
                                                   "check", check, "message", text));
    else
        printf("%-5s %-14s %s\n", level_names[level], check, text);
}

/* ------------------------------------------------------------------ devices */

static void say_device(struct doctor *d, const struct engine_device *device,
                       const struct device_list *wanted)
{
    enum level missing = devices_index(wanted, device->name) >= 0 ? LEVEL_FAIL : LEVEL_WARN;

    if (!device->usable)
        say(d, missing, device->name, "not used: %s", device->reason);
    else if (strstr(device->description, " plain kernels") != NULL)
        say(d, LEVEL_WARN, device->name, "%s: without AVX2 it is slow; use a newer processor",
            device->description);
    else if (device->memory_bytes > 0 && device->memory_free < LOW_MEMORY)
        say(d, LEVEL_WARN, device->name,
            "%s; %.1f of %.1f GiB free: stop what else uses it, or train small models only",
            device->description, GIB(device->memory_free), GIB(device->memory_bytes));
    else
        say(d, LEVEL_OK, device->name, "%s; %.1f of %.1f GiB free", device->description,
            GIB(device->memory_free), GIB(device->memory_bytes));
}

/* Says what a child finds of `which` (empty: all there is), and takes it off `rest`. */
static void look(struct doctor *d, const struct device_list *which,
                 const struct device_list *wanted, struct device_list *rest)
{
    struct engine_device found[DEVICES_MAX];
    struct err err = {0};
    int count;

    if (devices_probe(which, found, DEVICES_MAX, &count, &err) != 0) {
        say(d, wanted->count > 0 ? LEVEL_FAIL : LEVEL_WARN, "devices", "%s", err.message);
        return;
    }
    for (int i = 0; i < count; i++) {
        int at = devices_index(rest, found[i].name);

        say_device(d, &found[i], wanted);
        if (at >= 0)
            memcpy(rest->name[at], rest->name[--rest->count], sizeof rest->name[at]);
    }
}

static void check_devices(struct doctor *d)
{
    static const struct device_list all;
    struct device_list wanted, infer = {0}, rest, none = {0};

    devices_parse(d->settings->devices, &wanted, NULL);
    if (d->settings->infer_device[0] != '\0')
        devices_parse(d->settings->infer_device, &infer, NULL);
    if (infer.count == 1 && devices_index(&wanted, infer.name[0]) < 0 && wanted.count < DEVICES_MAX)
        memcpy(wanted.name[wanted.count++], infer.name[0], sizeof infer.name[0]);
    rest = wanted;
    look(d, &all, &wanted, &rest);
    if (rest.count > 0) /* named, and not found by itself */
        look(d, &rest, &wanted, &none);
}

/* ------------------------------------------------------------------ the data directory */

/* The nearest folder above `path` that is there: where a new one would be made. */
static char *existing(const char *path)
{
    char *dir = strdup(path), *slash;
    struct stat st;

    while (dir != NULL && stat(dir, &st) != 0) {
        slash = strrchr(dir, '/');
        if (slash == NULL)
            snprintf(dir, strlen(dir) + 1, ".");
        else if (slash == dir)
            slash[1] = '\0';
        else
            *slash = '\0';
    }
    return dir;
}

static void check_room(struct doctor *d, const char *dir)
{
    struct err err = {0};
    int64_t bytes;

    if (capacity_disk(dir, &bytes, &err) != 0)
        say(d, LEVEL_FAIL, "disk", "%s", err.message);
    else if (bytes <= CAPACITY_RESERVE)
        say(d, LEVEL_FAIL, "disk", "%.2f GiB free: nothing can be stored; make room", GIB(bytes));
    else if (bytes < LOW_DISK)
        say(d, LEVEL_WARN, "disk",
            "%.1f GiB free: base models and checkpoints want more; make room, or move --data",
            GIB(bytes));
    else
        say(d, LEVEL_OK, "disk", "%.1f GiB free", GIB(bytes));
}

/* true: it is there and can be used. */
static bool check_data(struct doctor *d)
{
    const char *data = d->settings->data;
    struct stat st;
    char *above;

    if (stat(data, &st) == 0) {
        if (!S_ISDIR(st.st_mode))
            say(d, LEVEL_FAIL, "data", "%s is no folder: give another --data", data);
        else if (access(data, R_OK | W_OK | X_OK) != 0)
            say(d, LEVEL_FAIL, "data",
                "%s can not be written by this user: run as its owner (user %d), or change that",
                data, (int)st.st_uid);
        else
            say(d, LEVEL_OK, "data", "%s", data);
        check_room(d, data);
        return S_ISDIR(st.st_mode) && access(data, R_OK | W_OK | X_OK) == 0;
    }
    above = existing(data);
    if (above == NULL || stat(above, &st) != 0 || !S_ISDIR(st.st_mode) ||
        access(above, W_OK | X_OK) != 0)
        say(d, LEVEL_FAIL, "data", "%s can not be made: %s is not this user's to write in", data,
            above != NULL ? above : "its folder");
    else
        say(d, LEVEL_OK, "data", "%s will be made", data);
    if (above != NULL)
        check_room(d, above);
    free(above);
    return false;
}

/* ------------------------------------------------------------------ the database */

/* The major version that made the private database; 0: there is none yet. */
static int private_major(const char *data)
{
    char *path = NULL, *text = NULL;
    size_t len;
    int major = 0;

    if (asprintf(&path, "%s/pg/PG_VERSION", data) < 0)
        return 0;
    if (file_read_all(path, 64, &text, &len, NULL) == 0)
        major = atoi(text);
    free(text);
    free(path);
    return major;
}

static void check_models(struct doctor *d, const char *url)
{
    struct base_list bases = {0};
    struct err err = {0};
    struct db *db = NULL;
    char names[512] = "";
    size_t n = 0;

    if (db_open(&db, url, DB_ROLE_APP, &err) != 0 || bases_list(db, &bases, &err) != 0) {
        say(d, LEVEL_WARN, "models", "not known: %s (`graft migrate` makes the tables)",
            err.message);
        db_close(db);
        return;
    }
    for (int i = 0; i < bases.count && n < sizeof names - BASE_NAME_SIZE - 3; i++)
        n += (size_t)snprintf(names + n, sizeof names - n, "%s%s", i > 0 ? ", " : "",
                              bases.items[i].name);
    if (bases.count == 0)
        say(d, LEVEL_WARN, "models", "no base model yet: graft model import PATH --name NAME");
    else
        say(d, LEVEL_OK, "models", "%d: %s", bases.count, names);
    base_list_release(&bases);
    db_close(db);
}

static void check_url(struct doctor *d)
{
    struct err err = {0};
    struct db *db = NULL;

    if (db_open(&db, d->settings->database, DB_ROLE_LOGIN, &err) != 0 || db_ping(db, &err) != 0) {
        say(d, LEVEL_FAIL, "database", "%s: check --database and the server there", err.message);
        db_close(db);
        return;
    }
    db_close(db);
    say(d, LEVEL_OK, "database", "the one at the URL answers");
    check_models(d, d->settings->database);
}

static void check_private(struct doctor *d, bool data_usable)
{
    int major = private_major(d->settings->data);
    struct pg_cluster *cluster = NULL;
    struct pg_binaries programs;
    struct err err = {0};

    if (pg_binaries_find(major, &programs, &err) != 0) {
        say(d, LEVEL_FAIL, "postgresql", "%s", err.message);
        return;
    }
    say(d, LEVEL_OK, "postgresql", "version %d", programs.major);
    if (!data_usable || major == 0) {
        say(d, LEVEL_OK, "database", "a private one will be made at the first start");
        say(d, LEVEL_WARN, "models", "no base model yet: graft model import PATH --name NAME");
        return;
    }
    if (pg_cluster_acquire(&cluster, d->settings->data, &err) != 0) {
        say(d, LEVEL_FAIL, "database", "%s", err.message);
        return;
    }
    say(d, LEVEL_OK, "database", "the private one answers");
    check_models(d, pg_cluster_url(cluster));
    pg_cluster_release(cluster);
}

/* ------------------------------------------------------------------ the whole */

static int finish(struct doctor *d, struct err *err)
{
    json_t *root;
    int rc;

    if (!d->json) {
        printf("%d ok, %d to look at, %d must be mended\n", d->count[LEVEL_OK],
               d->count[LEVEL_WARN], d->count[LEVEL_FAIL]);
        return 0;
    }
    root = json_pack("{s:s, s:b, s:o}", "version", GRAFT_VERSION, "healthy",
                     d->count[LEVEL_FAIL] == 0, "checks", d->checks);
    rc = root == NULL ? -1 : json_dumpf(root, stdout, JSON_INDENT(2));
    json_decref(root);
    putchar('\n');
    return rc == 0 ? 0 : err_set(err, ERR_INTERNAL, "the findings can not be printed");
}

int cmd_doctor(const struct settings *settings, const struct setting_args *args, struct err *err)
{
    struct doctor d = {.settings = settings, .json = args->options[CMD_DOCTOR_JSON] != NULL};
    bool data_usable;

    if (d.json)
        d.checks = json_array();
    say(&d, LEVEL_OK, "graft", "version %s", GRAFT_VERSION);
    fflush(stdout); /* the child that looks for devices shares it */
    check_devices(&d);
    data_usable = check_data(&d);
    if (settings->database[0] != '\0')
        check_url(&d);
    else
        check_private(&d, data_usable);
    if (finish(&d, err) != 0)
        return CMD_FAILED;
    return d.count[LEVEL_FAIL] == 0 ? CMD_DONE : CMD_FAILED;
}
