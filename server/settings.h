/* settings.h: every setting of the program in one table, read once at start.
 *
 * A setting has a name (its key in the file), a flag, an environment variable, a kind, a default
 * and a line of help; precedence is flag > environment > file (--config) > default. No other file
 * calls getenv, and after settings_load the struct is never changed: any thread may read it.
 *
 * The file is lines `key = value`; `#` starts a comment. Durations are seconds with an optional
 * fraction, sizes are bytes with an optional K, M, G or T (1024-based).
 *
 * Secrets (the database URL may hold a password) can come from the environment or a file, are never
 * printed, and reach our own worker processes through their environment. */
#ifndef GRAFT_SETTINGS_H
#define GRAFT_SETTINGS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "engine/base/err.h"
#include "engine/engine.h"

/* Strings are never NULL; "" means not set. */
struct settings {
    const char *data;          /* data directory: blobs, models, private database */
    const char *listen;        /* HOST:PORT; port 0 picks one */
    const char *database;      /* PostgreSQL URL; "": a private cluster below data */
    const char *database_file; /* file whose first line is that URL */
    const char *tls_cert, *tls_key;
    const char *log_level; /* debug, info, warn, error */
    bool insecure;         /* listen beyond loopback without TLS */

    const char *devices;      /* auto, or names: devices.h */
    const char *infer_device; /* "": the first of devices */
    const char *precision;    /* of the engines: auto, f32, bf16 */
    double watchdog; /* s that a call to a device other than the cpu may be silent; 0: ever */

    int64_t workers;        /* train worker processes on the cpu, 0..64; 0: none on any device */
    int64_t threads;        /* engine threads of each worker; 0: one for each core */
    int64_t http_threads;   /* event threads */
    int64_t handlers;       /* handler threads, each with a database connection */
    int64_t connections;    /* open client connections at most */
    int64_t max_body;       /* bytes of a JSON body, where its route takes as many */
    int64_t max_file;       /* bytes of an uploaded file */
    double header_deadline; /* s until a request's headers must be complete */
    double body_deadline;   /* s until a JSON body must be complete (uploads: see http_server.h) */
    double drain;           /* s that a stopping server lets requests and workers finish */

    int64_t lease;        /* s that a job is a worker's without a renewal */
    double heartbeat;     /* s between two renewals */
    double fence;         /* s without a successful renewal after which a worker stops by itself */
    double sweep;         /* s between two looks for dead workers and expired leases */
    double poll;          /* s between two looks for work of an idle train worker */
    double recovery;      /* s between two recovery checkpoints */
    double disk_patience; /* s that a finished job waits for room on a full disk */
    double collect;       /* s between two runs of the blob collector; 0: never */
    double grace;         /* s that a blob without a row is left alone */
    int64_t max_attempts; /* crashes of its workers in a row after which a job fails as
                             worker_crashed */

    int64_t infer_sequences; /* answered at once by each base */
    int64_t infer_queue;     /* requests waiting or answered at once; more get 429 */
    int64_t infer_context;   /* tokens of a chat at most, up to the model's context, 64 or more;
                                0: 4096 */
    int64_t base_memory;     /* bytes of base models kept loaded */
    int64_t delta_memory;    /* bytes of deltas kept loaded */

    char *owned[64]; /* the strings above; settings_release frees them */
};

enum setting_kind {
    SETTING_STRING,
    SETTING_SECRET, /* a string that is never printed */
    SETTING_COUNT,  /* integer */
    SETTING_SIZE,   /* bytes, with K M G T */
    SETTING_TIME,   /* seconds */
    SETTING_SWITCH, /* flag without a value; true/false elsewhere */
};

struct setting {
    const char *name; /* key in the file */
    const char *flag;
    const char *variable;
    const char *argument; /* how help calls the value; NULL for a switch */
    enum setting_kind kind;
    const char *default_value;
    double min, max; /* of a number */
    size_t offset;   /* in struct settings */
    const char *help;
};

extern const struct setting setting_table[];
extern const size_t setting_count;

/* An option that only one subcommand has (`--org` of `key create`). */
struct setting_option {
    const char *flag;
    const char *argument; /* NULL: a switch, its value is "true" */
    const char *help;
};
#define SETTING_OPTIONS_MAX 16

/* What a command line may hold. `settings`: names out of setting_table, NULL-terminated; `options`:
 * ended by a NULL flag. */
struct setting_spec {
    const char *const *settings;
    const struct setting_option *options;
    int args_min, args_max; /* positional arguments */
};

/* What it held. Pointers into argv. */
struct setting_args {
    const char *options[SETTING_OPTIONS_MAX]; /* by index in spec->options; NULL: not given */
    const char *const *args;
    int arg_count;
};

/* argv: what follows the subcommand; it may be reordered. ERR_INVALID is a usage error: an unknown
 * flag, a value that is no number or out of bounds, too many arguments. A `--help` is the caller's.
 */
int settings_load(struct settings *settings, struct setting_args *args,
                  const struct setting_spec *spec, int argc, char **argv, struct err *err);
void settings_release(struct settings *settings);
enum engine_precision settings_precision(const struct settings *settings);

/* Environment for a worker process: this process's own, with every setting's variable set to its
 * value here, so that a worker sees the same settings without secrets in its argv. NULL: out of
 * memory. */
char **settings_environment(const struct settings *settings);
void settings_environment_free(char **environment);

/* Help text of the flags that `spec` allows, one line each, with variable and default. */
void settings_print_help(FILE *out, const struct setting_spec *spec);

#endif
