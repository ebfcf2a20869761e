#include "server/settings.h"

#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/file_io.h"
#include "server/devices.h"

extern char **environ;

#define AT(field) offsetof(struct settings, field)
#define CONFIG_MAX (1 << 20) /* bytes of a settings file */
#define INFER_CONTEXT_MIN 64 /* a chat's roles and system text may alone take half of it */

/* The file key is `name`; the three spellings stand side by side so that each can be searched for.
 */
const struct setting setting_table[] = {
    {"data", "--data", "GRAFT_DATA", "DIR", SETTING_STRING, "graft-data", 0, 0, AT(data),
     "data directory: blobs, models, the private database"},
    {"listen", "--listen", "GRAFT_LISTEN", "HOST:PORT", SETTING_STRING, "127.0.0.1:8080", 0, 0,
     AT(listen), "address of the API; port 0 picks a free one"},
    {"database", "--database", "GRAFT_DATABASE_URL", "URL", SETTING_SECRET, "", 0, 0, AT(database),
     "PostgreSQL to use; without it a private one runs in the data directory"},
    {"database_file", "--database-file", "GRAFT_DATABASE_FILE", "FILE", SETTING_STRING, "", 0, 0,
     AT(database_file), "file whose first line is that URL, to keep it out of argv"},
    {"tls_cert", "--tls-cert", "GRAFT_TLS_CERT", "FILE", SETTING_STRING, "", 0, 0, AT(tls_cert),
     "certificate chain (PEM)"},
    {"tls_key", "--tls-key", "GRAFT_TLS_KEY", "FILE", SETTING_STRING, "", 0, 0, AT(tls_key),
     "its private key (PEM)"},
    {"insecure", "--insecure", "GRAFT_INSECURE", NULL, SETTING_SWITCH, "false", 0, 0, AT(insecure),
     "listen beyond loopback without TLS"},
    {"log_level", "--log-level", "GRAFT_LOG_LEVEL", "LEVEL", SETTING_STRING, "info", 0, 0,
     AT(log_level), "debug, info, warn or error"},
    {"devices", "--devices", "GRAFT_DEVICES", "LIST", SETTING_STRING, "auto", 0, 0, AT(devices),
     "auto, cpu, or cuda:0,cuda:1,…: a train worker on each"},
    {"infer_device", "--infer-device", "GRAFT_INFER_DEVICE", "DEVICE", SETTING_STRING, "", 0, 0,
     AT(infer_device), "of the infer worker; without it the first of --devices"},
    {"precision", "--precision", "GRAFT_PRECISION", "NAME", SETTING_STRING, "auto", 0, 0,
     AT(precision), "of activations and weights: f32, bf16; auto: bf16 on CUDA devices, else f32"},
    {"watchdog", "--watchdog", "GRAFT_WATCHDOG", "SECONDS", SETTING_TIME, "60", 0, 86400,
     AT(watchdog), "a worker whose device is silent for this long ends itself; 0: never"},
    {"workers", "--workers", "GRAFT_WORKERS", "N", SETTING_COUNT, "1", 0, 64, AT(workers),
     "train workers on the cpu; 0: no training on any device"},
    {"threads", "--threads", "GRAFT_THREADS", "N", SETTING_COUNT, "0", 0, 1024, AT(threads),
     "engine threads of a worker; 0: one for each core"},
    {"http_threads", "--http-threads", "GRAFT_HTTP_THREADS", "N", SETTING_COUNT, "2", 1, 64,
     AT(http_threads), "event threads of the API"},
    {"handlers", "--handlers", "GRAFT_HANDLERS", "N", SETTING_COUNT, "8", 1, 256, AT(handlers),
     "handler threads, each with a database connection"},
    {"connections", "--connections", "GRAFT_CONNECTIONS", "N", SETTING_COUNT, "2000", 8, 1000000,
     AT(connections), "open client connections at most"},
    {"max_body", "--max-body", "GRAFT_MAX_BODY", "BYTES", SETTING_SIZE, "8M", 1024, 8388608,
     AT(max_body), "largest body of a chat request; others have 1M at most"},
    {"max_file", "--max-file", "GRAFT_MAX_FILE", "BYTES", SETTING_SIZE, "512M", 1024, 1e13,
     AT(max_file), "largest uploaded file"},
    {"header_deadline", "--header-deadline", "GRAFT_HEADER_DEADLINE", "SECONDS", SETTING_TIME, "10",
     0.1, 3600, AT(header_deadline), "time for a request's headers to arrive"},
    {"body_deadline", "--body-deadline", "GRAFT_BODY_DEADLINE", "SECONDS", SETTING_TIME, "30", 0.1,
     3600, AT(body_deadline),
     "time for a JSON body to arrive; an upload gets a second more for each 8 KiB"},
    {"drain", "--drain", "GRAFT_DRAIN", "SECONDS", SETTING_TIME, "30", 0, 3600, AT(drain),
     "time that a stopping server lets requests and workers finish"},
    {"lease", "--lease", "GRAFT_LEASE", "SECONDS", SETTING_COUNT, "30", 1, 3600, AT(lease),
     "a job whose worker is silent for this long is given to another"},
    {"heartbeat", "--heartbeat", "GRAFT_HEARTBEAT", "SECONDS", SETTING_TIME, "5", 0.1, 600,
     AT(heartbeat), "between two renewals of a lease"},
    {"fence", "--fence", "GRAFT_FENCE", "SECONDS", SETTING_TIME, "20", 0.5, 3000, AT(fence),
     "a worker that could not renew for this long stops by itself"},
    {"sweep", "--sweep", "GRAFT_SWEEP", "SECONDS", SETTING_TIME, "5", 0.1, 3600, AT(sweep),
     "between two looks for dead workers and expired leases"},
    {"poll", "--poll", "GRAFT_POLL", "SECONDS", SETTING_TIME, "1", 0.05, 600, AT(poll),
     "between two looks for work of an idle train worker"},
    {"recovery", "--recovery", "GRAFT_RECOVERY", "SECONDS", SETTING_TIME, "60", 0, 86400,
     AT(recovery), "between two recovery checkpoints; 0: after every step"},
    {"disk_patience", "--disk-patience", "GRAFT_DISK_PATIENCE", "SECONDS", SETTING_TIME, "600", 0,
     86400, AT(disk_patience),
     "a job waits this long for room on a full disk, or for a damaged base to be stored again"},
    {"collect", "--collect", "GRAFT_COLLECT", "SECONDS", SETTING_TIME, "3600", 0, 1e7, AT(collect),
     "between two collections of blobs without a row and of expired files; 0: never"},
    {"grace", "--grace", "GRAFT_GRACE", "SECONDS", SETTING_TIME, "86400", 0, 1e8, AT(grace),
     "a blob without a row is removed when it is older than this"},
    {"max_attempts", "--max-attempts", "GRAFT_MAX_ATTEMPTS", "N", SETTING_COUNT, "3", 1, 100,
     AT(max_attempts),
     "crashes in a row, without a newer checkpoint between, after which a job fails"},
    {"infer_sequences", "--infer-sequences", "GRAFT_INFER_SEQUENCES", "N", SETTING_COUNT, "8", 8,
     1024, AT(infer_sequences), "answers generated at once by each base model"},
    {"infer_queue", "--infer-queue", "GRAFT_INFER_QUEUE", "N", SETTING_COUNT, "256", 1, 1000000,
     AT(infer_queue), "chat requests open at once; more are refused with 429"},
    {"infer_context", "--infer-context", "GRAFT_INFER_CONTEXT", "TOKENS", SETTING_COUNT, "0", 0,
     1048576, AT(infer_context),
     "tokens of a chat, 64 at least, up to the model's own context; 0: 4096"},
    {"base_memory", "--base-memory", "GRAFT_BASE_MEMORY", "BYTES", SETTING_SIZE, "8G", 0, 1e15,
     AT(base_memory), "base models kept loaded (the one in use always is)"},
    {"delta_memory", "--delta-memory", "GRAFT_DELTA_MEMORY", "BYTES", SETTING_SIZE, "1G", 0, 1e15,
     AT(delta_memory), "deltas kept loaded (those in use always are)"},
};
const size_t setting_count = sizeof setting_table / sizeof setting_table[0];

static const struct setting config_setting = {"config",
                                              "--config",
                                              "GRAFT_CONFIG",
                                              "FILE",
                                              SETTING_STRING,
                                              "",
                                              0,
                                              0,
                                              0,
                                              "settings file: lines `key = value`"};

/* ------------------------------------------------------------------ values */

static int parse_number(const struct setting *s, const char *text, const char *source, double *out,
                        struct err *err)
{
    double scale = 1, v;
    char *end;

    errno = 0;
    v = strtod(text, &end);
    if (s->kind == SETTING_SIZE && *end != '\0' && end[1] == '\0') {
        static const char units[] = "KMGT";
        const char *u = strchr(units, toupper((unsigned char)*end));

        if (u != NULL) {
            scale = ldexp(1, 10 * (int)(u - units + 1));
            end++;
        }
    }
    v *= scale;
    if (end == text || *end != '\0' || errno != 0 || !isfinite(v))
        return err_set(err, ERR_INVALID, "%s: \"%s\" is not a number", source, text);
    if (s->kind != SETTING_TIME && v != floor(v))
        return err_set(err, ERR_INVALID, "%s: \"%s\" is not a whole number", source, text);
    if (v < s->min || v > s->max)
        return err_set(err, ERR_INVALID, "%s: %s is outside %.15g to %.15g", source, text, s->min,
                       s->max);
    *out = v;
    return 0;
}

static int keep_string(struct settings *settings, size_t index, const char *text, char **out,
                       struct err *err)
{
    _Static_assert(sizeof setting_table / sizeof setting_table[0] <=
                       sizeof((struct settings *)0)->owned / sizeof(char *),
                   "settings.owned has a place for each setting");

    free(settings->owned[index]);
    settings->owned[index] = strdup(text);
    if (settings->owned[index] == NULL)
        return err_set(err, ERR_NO_MEMORY, "settings: out of memory");
    *out = settings->owned[index];
    return 0;
}

/* `source` says where the value stands, for messages; a secret's value is never in them. */
static int set_value(struct settings *settings, const struct setting *s, const char *text,
                     const char *source, struct err *err)
{
    char *field = (char *)settings + s->offset;
    double v;

    switch (s->kind) {
    case SETTING_STRING:
    case SETTING_SECRET:
        return keep_string(settings, (size_t)(s - setting_table), text, (char **)(void *)field,
                           err);
    case SETTING_COUNT:
    case SETTING_SIZE:
        if (parse_number(s, text, source, &v, err) != 0)
            return -1;
        *(int64_t *)(void *)field = (int64_t)v;
        return 0;
    case SETTING_TIME:
        return parse_number(s, text, source, (double *)(void *)field, err);
    case SETTING_SWITCH:
        if (strcmp(text, "true") != 0 && strcmp(text, "false") != 0)
            return err_set(err, ERR_INVALID, "%s: \"%s\" is neither true nor false", source, text);
        *(bool *)(void *)field = strcmp(text, "true") == 0;
        return 0;
    }
    return 0;
}

/* ------------------------------------------------------------------ the file */

static char *trim(char *s)
{
    size_t n;

    while (isspace((unsigned char)*s))
        s++;
    n = strlen(s);
    while (n > 0 && isspace((unsigned char)s[n - 1]))
        s[--n] = '\0';
    return s;
}

static const struct setting *find_setting(const char *name)
{
    for (size_t i = 0; i < setting_count; i++) {
        if (strcmp(setting_table[i].name, name) == 0)
            return &setting_table[i];
    }
    return NULL;
}

static int load_line(struct settings *settings, char *line, const char *path, int number,
                     struct err *err)
{
    const struct setting *s;
    char source[512];
    char *key, *value;

    line[strcspn(line, "\r\n")] = '\0';
    key = trim(line);
    if (*key == '\0' || *key == '#')
        return 0;
    value = strchr(key, '=');
    if (value == NULL)
        return err_set(err, ERR_INVALID, "%s: line %d: expected `key = value`", path, number);
    *value++ = '\0';
    key = trim(key);
    value = trim(value);
    s = find_setting(key);
    if (s == NULL)
        return err_set(err, ERR_INVALID, "%s: line %d: there is no setting \"%s\"", path, number,
                       key);
    snprintf(source, sizeof source, "%s: line %d: %s", path, number, key);
    return set_value(settings, s, value, source, err);
}

static int load_file(struct settings *settings, const char *path, struct err *err)
{
    char *text = NULL, *line, *next;
    size_t len;
    int number = 0, rc = -1;

    if (file_read_all(path, CONFIG_MAX, &text, &len, err) != 0)
        return err_prefix(err, "settings file");
    if (strlen(text) != len) {
        err_set(err, ERR_INVALID, "%s: holds a zero byte: not a settings file", path);
        goto out;
    }
    for (line = text; line != NULL && *line != '\0'; line = next) {
        next = strchr(line, '\n');
        if (next != NULL)
            *next++ = '\0';
        if (load_line(settings, line, path, ++number, err) != 0)
            goto out;
    }
    rc = 0;
out:
    free(text);
    return rc;
}

/* ------------------------------------------------------------------ the command line */

static bool allowed(const struct setting_spec *spec, const struct setting *s)
{
    for (const char *const *n = spec->settings; n != NULL && *n != NULL; n++) {
        if (strcmp(*n, s->name) == 0)
            return true;
    }
    return false;
}

struct flag {
    const struct setting *setting; /* or */
    int option;                    /* index in spec->options; -1 */
    bool takes_value;
};

static bool find_flag(const struct setting_spec *spec, const char *name, size_t len,
                      struct flag *out)
{
    out->setting = NULL;
    out->option = -1;
    for (int i = 0; spec->options != NULL && spec->options[i].flag != NULL; i++) {
        if (strlen(spec->options[i].flag) == len && memcmp(spec->options[i].flag, name, len) == 0) {
            out->option = i;
            out->takes_value = spec->options[i].argument != NULL;
            return true;
        }
    }
    if (len == strlen(config_setting.flag) && memcmp(config_setting.flag, name, len) == 0) {
        out->setting = &config_setting;
        out->takes_value = true;
        return true;
    }
    for (size_t i = 0; i < setting_count; i++) {
        const struct setting *s = &setting_table[i];

        if (strlen(s->flag) == len && memcmp(s->flag, name, len) == 0 && allowed(spec, s)) {
            out->setting = s;
            out->takes_value = s->kind != SETTING_SWITCH;
            return true;
        }
    }
    return false;
}

/* What the command line says, before anything is applied: the file comes first. */
struct command_line {
    const char *values[sizeof setting_table / sizeof setting_table[0]];
    const char *config;
};

static int read_flag(struct command_line *line, struct setting_args *args,
                     const struct setting_spec *spec, int *i, int argc, char **argv,
                     struct err *err)
{
    const char *text = argv[*i];
    const char *equals = strchr(text, '=');
    size_t len = equals != NULL ? (size_t)(equals - text) : strlen(text);
    const char *value = "true";
    struct flag flag;

    if (!find_flag(spec, text, len, &flag))
        return err_set(err, ERR_INVALID, "unknown option %.*s", (int)len, text);
    if (flag.takes_value) {
        if (equals != NULL)
            value = equals + 1;
        else if (*i + 1 < argc)
            value = argv[++*i];
        else
            return err_set(err, ERR_INVALID, "%.*s needs a value", (int)len, text);
    } else if (equals != NULL) {
        return err_set(err, ERR_INVALID, "%.*s takes no value", (int)len, text);
    }
    if (flag.option >= 0)
        args->options[flag.option] = value;
    else if (flag.setting == &config_setting)
        line->config = value;
    else
        line->values[flag.setting - setting_table] = value;
    return 0;
}

static int read_command_line(struct command_line *line, struct setting_args *args,
                             const struct setting_spec *spec, int argc, char **argv,
                             struct err *err)
{
    bool flags_end = false;

    for (int i = 0; i < argc; i++) {
        if (!flags_end && strcmp(argv[i], "--") == 0)
            flags_end = true;
        else if (!flags_end && argv[i][0] == '-' && argv[i][1] != '\0') {
            if (read_flag(line, args, spec, &i, argc, argv, err) != 0)
                return -1;
        } else {
            argv[args->arg_count++] = argv[i]; /* the front of argv is read already */
        }
    }
    args->args = (const char *const *)argv;
    if (args->arg_count < spec->args_min)
        return err_set(err, ERR_INVALID, "an argument is missing");
    if (args->arg_count > spec->args_max)
        return err_set(err, ERR_INVALID, "unexpected argument \"%s\"", argv[spec->args_max]);
    return 0;
}

/* A URL in a file, so that neither argv nor the environment shows it. */
static int load_database_file(struct settings *settings, struct err *err)
{
    char *text = NULL;
    size_t len;
    int rc;

    if (settings->database_file[0] == '\0')
        return 0;
    if (file_read_all(settings->database_file, 65536, &text, &len, err) != 0)
        return err_prefix(err, "database file");
    text[strcspn(text, "\r\n")] = '\0';
    rc = set_value(settings, find_setting("database"), trim(text), "database file", err);
    free(text);
    if (rc == 0 && settings->database[0] == '\0')
        rc = err_set(err, ERR_INVALID, "database file %s: its first line is empty",
                     settings->database_file);
    return rc;
}

static int check_devices(const struct settings *s, struct err *err)
{
    enum engine_precision precision;
    struct device_list list;
    char name[DEVICE_NAME_SIZE];

    if (devices_parse(s->devices, &list, err) != 0)
        return err_prefix(err, "--devices");
    if (s->infer_device[0] != '\0' && devices_name(s->infer_device, name, err) != 0)
        return err_prefix(err, "--infer-device");
    if (engine_precision_parse(s->precision, &precision, err) != 0)
        return err_prefix(err, "--precision");
    return 0;
}

enum engine_precision settings_precision(const struct settings *settings)
{
    enum engine_precision precision = ENGINE_PRECISION_AUTO;
    struct err err = {0};

    /* It was looked at when the settings were read. */
    if (engine_precision_parse(settings->precision, &precision, &err) != 0)
        assert(!"a precision that is none");
    return precision;
}

static int check_together(const struct settings *s, struct err *err)
{
    static const char *const levels[] = {"debug", "info", "warn", "error"};
    bool level = false;

    for (size_t i = 0; i < sizeof levels / sizeof levels[0]; i++)
        level = level || strcmp(s->log_level, levels[i]) == 0;
    if (!level)
        return err_set(err, ERR_INVALID, "log level \"%s\": use debug, info, warn or error",
                       s->log_level);
    if ((s->tls_cert[0] == '\0') != (s->tls_key[0] == '\0'))
        return err_set(err, ERR_INVALID, "--tls-cert and --tls-key belong together");
    if (s->heartbeat >= s->fence)
        return err_set(err, ERR_INVALID, "heartbeat (%g s) must be shorter than fence (%g s)",
                       s->heartbeat, s->fence);
    /* A worker that is cut off must have stopped for good before its job is another's. */
    if (s->fence > (double)s->lease * 5 / 6)
        return err_set(err, ERR_INVALID,
                       "fence (%g s) must be at most five sixths of lease (%lld s)", s->fence,
                       (long long)s->lease);
    if (s->infer_context != 0 && s->infer_context < INFER_CONTEXT_MIN)
        return err_set(err, ERR_INVALID,
                       "infer_context (%lld tokens) leaves no room for a question and its answer: "
                       "use %d or more, or 0 for 4096",
                       (long long)s->infer_context, INFER_CONTEXT_MIN);
    return check_devices(s, err);
}

int settings_load(struct settings *settings, struct setting_args *args,
                  const struct setting_spec *spec, int argc, char **argv, struct err *err)
{
    const struct setting *file = find_setting("database_file");
    struct command_line line = {0};
    const char *config;

    memset(settings, 0, sizeof *settings);
    memset(args, 0, sizeof *args);
    if (read_command_line(&line, args, spec, argc, argv, err) != 0)
        goto fail;
    for (size_t i = 0; i < setting_count; i++) {
        const struct setting *s = &setting_table[i];

        if (set_value(settings, s, s->default_value, s->name, err) != 0)
            goto fail;
    }
    config = line.config != NULL ? line.config : getenv(config_setting.variable);
    if (config != NULL && *config != '\0' && load_file(settings, config, err) != 0)
        goto fail;
    for (size_t i = 0; i < setting_count; i++) {
        const struct setting *s = &setting_table[i];
        const char *value = getenv(s->variable);

        /* An empty variable counts as absent, as in a shell script that leaves it blank. A URL goes
         * before a file that the settings file names; the variable of that comes next. */
        if (value != NULL && *value != '\0' &&
            (set_value(settings, s, value, s->variable, err) != 0 ||
             (s + 1 == file && set_value(settings, file, "", file->name, err) != 0)))
            goto fail;
    }
    /* More precise than a URL from the environment, less than one in argv. */
    if (line.values[file - setting_table] != NULL)
        set_value(settings, file, line.values[file - setting_table], file->flag, err);
    if (err_is_set(err) || load_database_file(settings, err) != 0)
        goto fail;
    for (size_t i = 0; i < setting_count; i++) {
        if (line.values[i] != NULL &&
            set_value(settings, &setting_table[i], line.values[i], setting_table[i].flag, err) != 0)
            goto fail;
    }
    if (check_together(settings, err) != 0)
        goto fail;
    return 0;
fail:
    settings_release(settings);
    return -1;
}

void settings_release(struct settings *settings)
{
    for (size_t i = 0; i < sizeof settings->owned / sizeof settings->owned[0]; i++)
        free(settings->owned[i]);
    memset(settings, 0, sizeof *settings);
}

/* ------------------------------------------------------------------ printing */

static int format_value(const struct settings *settings, const struct setting *s, char **out)
{
    const char *field = (const char *)settings + s->offset;

    switch (s->kind) {
    case SETTING_STRING:
    case SETTING_SECRET:
        return asprintf(out, "%s=%s", s->variable, *(const char *const *)(const void *)field);
    case SETTING_COUNT:
    case SETTING_SIZE:
        return asprintf(out, "%s=%lld", s->variable,
                        (long long)*(const int64_t *)(const void *)field);
    case SETTING_TIME:
        return asprintf(out, "%s=%.17g", s->variable, *(const double *)(const void *)field);
    case SETTING_SWITCH:
        return asprintf(out, "%s=%s", s->variable,
                        *(const bool *)(const void *)field ? "true" : "false");
    }
    return -1;
}

static bool is_ours(const char *entry)
{
    const char *equals = strchr(entry, '=');
    size_t len = equals != NULL ? (size_t)(equals - entry) : strlen(entry);

    if (strlen(config_setting.variable) == len && memcmp(config_setting.variable, entry, len) == 0)
        return true;
    for (size_t i = 0; i < setting_count; i++) {
        const char *v = setting_table[i].variable;

        if (strlen(v) == len && memcmp(v, entry, len) == 0)
            return true;
    }
    return false;
}

char **settings_environment(const struct settings *settings)
{
    size_t inherited = 0, n = 0;
    char **out;

    while (environ[inherited] != NULL)
        inherited++;
    out = calloc(inherited + setting_count + 1, sizeof *out);
    if (out == NULL)
        return NULL;
    for (size_t i = 0; i < inherited; i++) {
        if (is_ours(environ[i]))
            continue;
        out[n] = strdup(environ[i]);
        if (out[n++] == NULL)
            goto fail;
    }
    for (size_t i = 0; i < setting_count; i++) {
        /* The URL is in `database` already; the file may be gone by the next restart. */
        if (strcmp(setting_table[i].name, "database_file") == 0)
            continue;
        if (format_value(settings, &setting_table[i], &out[n]) < 0) {
            out[n] = NULL;
            goto fail;
        }
        n++;
    }
    return out;
fail:
    settings_environment_free(out);
    return NULL;
}

void settings_environment_free(char **environment)
{
    for (char **e = environment; e != NULL && *e != NULL; e++)
        free(*e);
    free(environment);
}

static void print_setting(FILE *out, const struct setting *s)
{
    char left[64];

    snprintf(left, sizeof left, "%s%s%s", s->flag, s->argument != NULL ? " " : "",
             s->argument != NULL ? s->argument : "");
    fprintf(out, "  %-28s %s", left, s->help);
    if (s->kind != SETTING_SWITCH && s->default_value[0] != '\0')
        fprintf(out, " (default %s)", s->default_value);
    fprintf(out, " [%s]\n", s->variable);
}

void settings_print_help(FILE *out, const struct setting_spec *spec)
{
    for (int i = 0; spec->options != NULL && spec->options[i].flag != NULL; i++) {
        const struct setting_option *o = &spec->options[i];
        char left[64];

        snprintf(left, sizeof left, "%s%s%s", o->flag, o->argument != NULL ? " " : "",
                 o->argument != NULL ? o->argument : "");
        fprintf(out, "  %-28s %s\n", left, o->help);
    }
    for (size_t i = 0; i < setting_count; i++) {
        if (allowed(spec, &setting_table[i]))
            print_setting(out, &setting_table[i]);
    }
    if (spec->settings != NULL && spec->settings[0] != NULL)
        print_setting(out, &config_setting);
}
