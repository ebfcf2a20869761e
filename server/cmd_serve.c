/* `graft serve`: opens the durable things, starts the API, keeps the workers alive, and takes it
 * all down in the order in which nothing is lost. This process opens no model and no device. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include "engine/base/clock.h"
#include "engine/base/file_io.h"
#include "engine/base/log.h"
#include "server/api_context.h"
#include "server/api_routes.h"
#include "server/capacity.h"
#include "server/cmd.h"
#include "server/devices.h"
#include "server/http_server.h"
#include "server/infer_client.h"
#include "server/metrics.h"
#include "server/supervisor.h"
#include "server/sweeper.h"
#include "storage/db.h"
#include "storage/leases.h"
#include "storage/storage.h"

#define CONNECTIONS_BESIDE 20 /* of operators' commands, and what PostgreSQL keeps for itself */

struct server {
    const struct settings *settings;
    int lock;                   /* flock on DATA/serve.lock */
    struct device_list devices; /* of the train workers */
    struct device_list known;   /* with the infer worker's */
    char infer_device[DEVICE_NAME_SIZE];
    struct storage storage;
    struct infer_client *infer;
    struct supervisor *supervisor;
    struct sweeper *sweeper;
    struct http_server *http;
    struct api_context api;
};

/* One server for a data directory: the second is refused, not queued. The kernel lets go of the
 * lock when the process dies, however it dies. */
static int take_lock(struct server *s, struct err *err)
{
    char *path = NULL;
    int rc = 0;

    if (file_make_dirs(s->settings->data, 0700, err) != 0)
        return -1;
    if (asprintf(&path, "%s/serve.lock", s->settings->data) < 0)
        return err_set(err, ERR_NO_MEMORY, "serve: out of memory");
    s->lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (s->lock < 0)
        rc = err_set_errno(err, errno, "open %s", path);
    else if (flock(s->lock, LOCK_EX | LOCK_NB) != 0)
        rc = errno == EWOULDBLOCK
                 ? err_set(err, ERR_INVALID,
                           "another `graft serve` runs on %s: stop it first, or give this one "
                           "another --data",
                           s->settings->data)
                 : err_set_errno(err, errno, "lock %s", path);
    free(path);
    return rc;
}

/* To the database at once: each handler's, the sweeper's and a self-test's; of a train worker its
 * own, its heartbeat's and the one that lets a job go when the device is stuck; commands beside us.
 */
static int connections_wanted(const struct server *s)
{
    int workers = s->devices.count + (int)s->settings->workers;

    return (int)s->settings->handlers + 2 + 3 * workers + CONNECTIONS_BESIDE;
}

/* A database that runs already, or is somebody else's, may allow fewer: requests would fail then,
 * now and again. */
static void check_connections(struct server *s, struct db *db)
{
    struct db_result *res = NULL;

    if (db_begin(db, NULL, NULL) != 0)
        return;
    if (db_exec(db, "SELECT current_setting('max_connections')::bigint", DB_NO_ARGS, &res, NULL) ==
            0 &&
        db_rows(res) == 1 && db_int(res, 0, 0) < connections_wanted(s))
        log_warn("the database allows %lld connections, and this server with its workers may want "
                 "%d: raise its max_connections, or lower --handlers",
                 (long long)db_int(res, 0, 0), connections_wanted(s));
    db_result_free(res);
    db_rollback(db);
}

static int self_test(struct server *s, enum db_role role, struct err *err)
{
    struct db *db = NULL;
    int rc = db_open(&db, s->storage.url, role, err);

    if (rc == 0)
        rc = db_self_test(db, err);
    if (rc == 0 && role == DB_ROLE_WORKER)
        check_connections(s, db);
    db_close(db);
    return rc;
}

static void worker_died(void *context, pid_t pid)
{
    struct server *s = context;

    sweeper_worker_died(s->sweeper);
}

static int workers_ready(struct api_context *api, struct err *err)
{
    struct supervisor_stats stats;

    supervisor_stats(api->supervisor, &stats);
    if (!infer_client_ready(api->infer))
        return err_set_code(err, ERR_UNAVAILABLE, "worker_unavailable", NULL,
                            "the infer worker is not there");
    if (stats.train_workers == 0 && stats.train_wanted > 0)
        return err_set_code(err, ERR_UNAVAILABLE, "worker_unavailable", NULL,
                            "no train worker is there");
    return 0;
}

/* Which devices the workers get. */
static int choose_devices(struct server *s, struct err *err)
{
    const char *infer = s->settings->infer_device;
    struct device_list list;

    if (devices_find(s->settings->devices, &s->devices, err) != 0)
        return err_prefix(err, "--devices");
    list = s->devices;
    if (infer[0] != '\0' && devices_find(infer, &list, err) != 0)
        return err_prefix(err, "--infer-device");
    snprintf(s->infer_device, sizeof s->infer_device, "%s", list.name[0]);
    s->known = s->devices;
    if (devices_index(&s->known, list.name[0]) < 0 && s->known.count < DEVICES_MAX) {
        int at = s->known.count++;

        memcpy(s->known.name[at], list.name[0], sizeof list.name[0]);
        memcpy(s->known.description[at], list.description[0], sizeof list.description[0]);
    }
    return 0;
}

static int start_workers(struct server *s, struct err *err)
{
    const struct infer_client_options client = {.max_requests = s->settings->infer_queue};
    struct supervisor_options options = {.settings = s->settings,
                                         .database = s->storage.url,
                                         .devices = &s->devices,
                                         .infer_device = s->infer_device,
                                         .died = worker_died,
                                         .context = s};

    if (sweeper_open(&s->sweeper, s->settings, &s->storage, err) != 0 ||
        infer_client_open(&s->infer, &client, err) != 0)
        return -1;
    options.infer = s->infer;
    return supervisor_open(&s->supervisor, &options, err);
}

static struct http_server_options http_options(struct server *s)
{
    const struct settings *t = s->settings;

    return (struct http_server_options){
        .listen = t->listen,
        .tls_cert = t->tls_cert[0] != '\0' ? t->tls_cert : NULL,
        .tls_key = t->tls_key[0] != '\0' ? t->tls_key : NULL,
        .insecure = t->insecure,
        .routes = api_routes,
        .route_count = api_route_count,
        .database_url = s->storage.url,
        .data_dir = t->data,
        .api = &s->api,
        .on_answer = metrics_count_request,
        .event_threads = (int)t->http_threads,
        .handler_threads = (int)t->handlers,
        .max_connections = (int)t->connections,
        .max_json_body = t->max_body,
        .max_file_bytes = t->max_file,
        .header_deadline_ms = (int)(1000 * t->header_deadline),
        .body_deadline_ms = (int)(1000 * t->body_deadline),
    };
}

static int start_http(struct server *s, struct err *err)
{
    const struct http_server_options options = http_options(s);

    blob_store_keep_free(s->storage.blobs, CAPACITY_RESERVE);
    s->api = (struct api_context){.blobs = s->storage.blobs,
                                  .infer = s->infer,
                                  .supervisor = s->supervisor,
                                  .devices = &s->known,
                                  .workers_ready = workers_ready};
    return http_server_start(&s->http, &options, err);
}

static int start(struct server *s, struct err *err)
{
    const struct settings *t = s->settings;

    const struct http_server_options http = http_options(s);

    /* What is quickly seen comes before a database is made. */
    if (choose_devices(s, err) != 0 || take_lock(s, err) != 0 ||
        http_server_check(&http, err) != 0 ||
        storage_open_for(&s->storage, t->data, t->database[0] != '\0' ? t->database : NULL,
                         connections_wanted(s), err) != 0)
        return -1;
    if (self_test(s, DB_ROLE_APP, err) != 0 || self_test(s, DB_ROLE_WORKER, err) != 0)
        return -1;
    return start_workers(s, err) != 0 || start_http(s, err) != 0 ? -1 : 0;
}

/* Second SIGINT: everything at once. Workers see their lifeline end; the private database stays and
 * is adopted by the next start. */
static void give_up(int signo)
{
    _exit(CMD_FAILED);
}

/* Requests drain while the train workers save; the infer worker stays until streams have ended. */
static void stop(struct server *s)
{
    double deadline = clock_now() + s->settings->drain, left;

    signal(SIGINT, give_up);
    supervisor_unblock_interrupt();
    if (s->http != NULL)
        http_server_quiesce(s->http);
    if (s->supervisor != NULL)
        supervisor_stop_training(s->supervisor);
    http_server_stop(s->http, (int)(1000 * s->settings->drain));
    infer_client_free(s->infer); /* its worker ends with the line */
    left = deadline - clock_now();
    if (s->supervisor != NULL)
        supervisor_stop(s->supervisor, left > 1 ? left : 1);
    supervisor_free(s->supervisor);
    sweeper_free(s->sweeper);
    storage_release(&s->storage);
    if (s->lock >= 0)
        close(s->lock);
}

int cmd_serve(const struct settings *settings, const struct setting_args *args, struct err *err)
{
    struct server s = {.settings = settings, .lock = -1};
    int rc;

    supervisor_block_signals();
    rc = start(&s, err);
    if (rc == 0) {
        fprintf(stderr, "graft: listening on %s\n", http_server_url(s.http));
        rc = supervisor_run(s.supervisor, err);
        log_info("stopping");
    }
    stop(&s);
    return rc == 0 ? CMD_DONE : CMD_FAILED;
}
