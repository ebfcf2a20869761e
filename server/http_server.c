#include "server/http_server.h"

#include <errno.h>
#include <openssl/crypto.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "engine/base/file_io.h"
#include "engine/base/log.h"
#include "server/api_context.h"
#include "server/http_connections.h"
#include "server/http_internal.h"
#include "server/http_listen.h"

#define CLOCK_TICK_MS 50
#define CLOCK_IDLE_MS 200
#define MEMORY_PER_CONNECTION (32u << 10) /* half for headers (16 kB), half for sending */
#define PEM_MAX (1u << 20)
#define TLS_PRIORITIES "SECURE128:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2"

int64_t http_now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* ------------------------------------------------------------------ the clock thread */

static void *clock_thread(void *argument)
{
    struct http_server *server = argument;
    int64_t swept = 0;
    while (!atomic_load(&server->stop_clock)) {
        pthread_mutex_lock(&server->laters.lock);
        bool streams = server->laters.count > 0;
        pthread_mutex_unlock(&server->laters.lock);
        struct timespec pause = {.tv_nsec = (streams ? CLOCK_TICK_MS : CLOCK_IDLE_MS) * 1000000L};
        nanosleep(&pause, NULL);
        http_laters_tick(server);
        int64_t now = http_now_ms();
        if (now - swept >= CLOCK_IDLE_MS) {
            http_connections_sweep(&server->connections, now);
            swept = now;
        }
    }
    return NULL;
}

/* ------------------------------------------------------------------ start */

static int64_t or_default(int64_t value, int64_t fallback)
{
    return value > 0 ? value : fallback;
}

static int copy_string(const char **slot, struct err *err)
{
    if (!*slot)
        return 0;
    *slot = strdup(*slot);
    return *slot ? 0 : err_set(err, ERR_NO_MEMORY, "out of memory");
}

/* Connections are limited by descriptors too; some stay free for files, the database and workers.
 */
static int connection_limit(int wanted)
{
    struct rlimit files;
    int64_t limit = or_default(wanted, 4096);
    if (getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur != RLIM_INFINITY &&
        limit > (int64_t)files.rlim_cur - 256)
        limit = (int64_t)files.rlim_cur > 512 ? (int64_t)files.rlim_cur - 256 : 256;
    if (limit < wanted)
        log_warn("at most %lld connections: the limit of open files (ulimit -n) allows no more",
                 (long long)limit);
    return (int)limit;
}

static int set_options(struct http_server *server, const struct http_server_options *options,
                       struct err *err)
{
    struct http_server_options *o = &server->options;
    *o = *options;
    o->listen = o->tls_cert = o->tls_key = o->data_dir = NULL;
    if (copy_string(&o->database_url, err) < 0)
        return -1;
    o->event_threads = (int)or_default(o->event_threads, 2);
    o->handler_threads = (int)or_default(o->handler_threads, 8);
    o->queue_length = (int)or_default(o->queue_length, 256);
    o->max_connections = connection_limit(o->max_connections);
    o->max_file_bytes = or_default(o->max_file_bytes, HTTP_LIMIT_FILE);
    o->header_deadline_ms = (int)or_default(o->header_deadline_ms, 10000);
    o->idle_ms = (int)or_default(o->idle_ms, 75000);
    o->body_deadline_ms = (int)or_default(o->body_deadline_ms, 60000);
    o->ping_ms = (int)or_default(o->ping_ms, 15000);
    o->upload_bytes_per_second = or_default(o->upload_bytes_per_second, 8192);
    return 0;
}

static void mhd_log(void *context, const char *format, va_list args)
    __attribute__((format(printf, 2, 0)));
static void mhd_log(void *context, const char *format, va_list args)
{
    char text[256];
    vsnprintf(text, sizeof(text), format, args);
    text[strcspn(text, "\r\n")] = '\0';
    log_debug("libmicrohttpd: %s", text);
}

struct tls_files {
    char *cert, *key; /* NULL without TLS */
};

static int read_tls(struct tls_files *tls, const struct http_server_options *options,
                    struct err *err)
{
    size_t len;
    if (!options->tls_cert != !options->tls_key)
        return err_set(err, ERR_INVALID, "--tls-cert and --tls-key belong together");
    if (!options->tls_cert)
        return 0;
    if (file_read_all(options->tls_cert, PEM_MAX, &tls->cert, &len, err) < 0 ||
        file_read_all(options->tls_key, PEM_MAX, &tls->key, &len, err) < 0)
        return -1;
    return 0;
}

static int refuse_tls(struct err *err)
{
    return err_set(err, ERR_INVALID,
                   "libmicrohttpd does not start: are certificate and key PEM files that belong "
                   "together?");
}

static int start_daemon(struct http_server *server, const struct tls_files *tls, struct err *err)
{
    const struct http_server_options *o = &server->options;
    unsigned flags = MHD_USE_EPOLL_INTERNAL_THREAD | MHD_USE_ITC | MHD_ALLOW_SUSPEND_RESUME |
                     MHD_USE_ERROR_LOG | (tls->cert ? MHD_USE_TLS : 0);
    struct MHD_OptionItem items[24];
    int n = 0;
#define OPTION(name, number, pointer) \
    items[n++] = (struct MHD_OptionItem){(name), (intptr_t)(number), (pointer)}
    OPTION(MHD_OPTION_EXTERNAL_LOGGER, (intptr_t)mhd_log, NULL);
    OPTION(MHD_OPTION_LISTEN_SOCKET, server->listen_fd, NULL);
    if (o->event_threads > 1)
        OPTION(MHD_OPTION_THREAD_POOL_SIZE, o->event_threads, NULL);
    OPTION(MHD_OPTION_CONNECTION_LIMIT, o->max_connections, NULL);
    OPTION(MHD_OPTION_CONNECTION_MEMORY_LIMIT, MEMORY_PER_CONNECTION, NULL);
    OPTION(MHD_OPTION_URI_LOG_CALLBACK, (intptr_t)http_exchange_target, server);
    OPTION(MHD_OPTION_NOTIFY_COMPLETED, (intptr_t)http_exchange_completed, server);
    OPTION(MHD_OPTION_NOTIFY_CONNECTION, (intptr_t)http_exchange_connection, server);
#if MHD_VERSION >= 0x00097701
    OPTION(MHD_OPTION_CLIENT_DISCIPLINE_LVL, 1, NULL);
#else
    OPTION(MHD_OPTION_STRICT_FOR_CLIENT, 1, NULL);
#endif
    if (tls->cert) {
        OPTION(MHD_OPTION_HTTPS_MEM_CERT, 0, tls->cert);
        OPTION(MHD_OPTION_HTTPS_MEM_KEY, 0, tls->key);
        OPTION(MHD_OPTION_HTTPS_PRIORITIES, 0, (void *)(uintptr_t)TLS_PRIORITIES);
    }
    OPTION(MHD_OPTION_END, 0, NULL);
#undef OPTION
    server->daemon = MHD_start_daemon(flags, 0, NULL, NULL, http_exchange_access, server,
                                      MHD_OPTION_ARRAY, items, MHD_OPTION_END);
    if (!server->daemon)
        return tls->cert ? refuse_tls(err)
                         : err_set(err, ERR_INTERNAL, "libmicrohttpd does not start");
    return 0;
}

static void free_tls(struct tls_files *tls)
{
    free(tls->cert);
    if (tls->key)
        OPENSSL_cleanse(tls->key, strlen(tls->key));
    free(tls->key);
}

static int open_listen(struct http_listen *listen, const struct http_server_options *options,
                       const struct tls_files *tls, struct err *err)
{
    return http_listen_open(listen, options->listen ? options->listen : "127.0.0.1:8080",
                            !tls->cert && !options->insecure, err);
}

/* A daemon without a socket or a thread reads certificate and key as the real one does. */
static int check_tls(const struct tls_files *tls, struct err *err)
{
    struct MHD_Daemon *daemon =
        MHD_start_daemon(MHD_USE_TLS | MHD_USE_NO_LISTEN_SOCKET, 0, NULL, NULL,
                         http_exchange_access, NULL, MHD_OPTION_EXTERNAL_LOGGER, mhd_log, NULL,
                         MHD_OPTION_HTTPS_MEM_CERT, tls->cert, MHD_OPTION_HTTPS_MEM_KEY, tls->key,
                         MHD_OPTION_HTTPS_PRIORITIES, TLS_PRIORITIES, MHD_OPTION_END);

    if (!daemon)
        return refuse_tls(err);
    MHD_stop_daemon(daemon);
    return 0;
}

int http_server_check(const struct http_server_options *options, struct err *err)
{
    struct tls_files tls = {0};
    struct http_listen listen;
    int rc = read_tls(&tls, options, err);
    if (rc == 0)
        rc = open_listen(&listen, options, &tls, err);
    if (rc == 0)
        close(listen.fd);
    if (rc == 0 && tls.cert)
        rc = check_tls(&tls, err);
    free_tls(&tls);
    return rc;
}

static int start(struct http_server *server, const struct http_server_options *options,
                 struct tls_files *tls, struct err *err)
{
    struct http_listen listen;
    if (set_options(server, options, err) < 0 || read_tls(tls, options, err) < 0 ||
        open_listen(&listen, options, tls, err) < 0)
        return -1;
    server->listen_fd = listen.fd;
    snprintf(server->url, sizeof(server->url), "%s://%s:%d", tls->cert ? "https" : "http",
             listen.host, listen.port);
    server->auth = http_auth_cache_new();
    if (!server->auth)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    if (http_handlers_start(server, server->options.handler_threads, server->options.queue_length,
                            err) < 0)
        return -1;
    if (server->options.api)
        server->options.api->http = server;
    server->in_place_parser = strncmp(MHD_get_version(), "0.", 2) == 0;
    if (start_daemon(server, tls, err) < 0)
        return -1;
    int rc = pthread_create(&server->clock, NULL, clock_thread, server);
    if (rc != 0)
        return err_set_errno(err, rc, "can not start the clock thread");
    server->clock_runs = true;
    return 0;
}

int http_server_start(struct http_server **out, const struct http_server_options *options,
                      struct err *err)
{
    struct tls_files tls = {0};
    struct http_server *server = calloc(1, sizeof(*server));
    if (!server)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    server->listen_fd = -1;
    http_connections_init(&server->connections, connection_limit(options->max_connections));
    pthread_mutex_init(&server->laters.lock, NULL);
    pthread_mutex_init(&server->handlers.lock, NULL);
    pthread_cond_init(&server->handlers.wake, NULL);
    int rc = start(server, options, &tls, err);
    free_tls(&tls);
    if (rc < 0) {
        http_server_stop(server, 0);
        return -1;
    }
    *out = server;
    return 0;
}

const char *http_server_url(const struct http_server *server)
{
    return server->url;
}

/* ------------------------------------------------------------------ stop */

void http_server_quiesce(struct http_server *server)
{
    if (atomic_exchange(&server->quiet, true) || !server->daemon)
        return;
    /* Refuses connections from now on; closed when MHD's threads, which may still have a look at
     * the descriptor, are gone. */
    if (MHD_quiesce_daemon(server->daemon) >= 0)
        shutdown(server->listen_fd, SHUT_RDWR);
}

/* Waits until nothing is under way, at most so long. */
static void drain(struct http_server *server, int64_t ms)
{
    int64_t end = http_now_ms() + ms;
    while (atomic_load(&server->under_way) > 0 && http_now_ms() < end) {
        struct timespec pause = {.tv_nsec = 10 * 1000000L};
        nanosleep(&pause, NULL);
    }
}

void http_server_stop(struct http_server *server, int drain_ms)
{
    if (!server)
        return;
    http_server_quiesce(server);
    drain(server, drain_ms);
    if (server->daemon)
        http_laters_abort(server, false); /* their answerers get a moment to end in order */
    drain(server, drain_ms < 500 ? drain_ms : 500);
    http_handlers_stop(server);
    if (server->daemon)
        http_laters_abort(server, true);
    drain(server, 1000); /* what was answered just now still goes out */
    if (server->clock_runs) {
        atomic_store(&server->stop_clock, true);
        pthread_join(server->clock, NULL);
    }
    if (server->daemon)
        MHD_stop_daemon(server->daemon); /* closes the connections that are left */
    if (server->listen_fd >= 0)
        close(server->listen_fd);
    http_auth_cache_free(server->auth);
    /* Not before: until now event threads may still ask for a handler, or for the numbers. */
    pthread_cond_destroy(&server->handlers.wake);
    pthread_mutex_destroy(&server->handlers.lock);
    pthread_mutex_destroy(&server->laters.lock);
    http_connections_release(&server->connections);
    free((void *)(uintptr_t)server->options.database_url);
    free(server);
}

void http_server_stats(struct http_server *server, struct http_server_stats *out)
{
    memset(out, 0, sizeof(*out));
    out->connections = http_connections_count(&server->connections);
    pthread_mutex_lock(&server->handlers.lock);
    out->queued = server->handlers.queued;
    out->handling = server->handlers.handling;
    out->handler_seconds = server->handlers.seconds;
    pthread_mutex_unlock(&server->handlers.lock);
    pthread_mutex_lock(&server->laters.lock);
    out->streams = server->laters.count;
    pthread_mutex_unlock(&server->laters.lock);
    out->requests = atomic_load(&server->requests);
    for (int i = 0; i < 6; i++)
        out->by_class[i] = atomic_load(&server->by_class[i]);
    out->refused_filter = atomic_load(&server->refused_filter);
    out->refused_busy = atomic_load(&server->refused_busy);
    out->cut_slow = atomic_load(&server->connections.cut);
    out->auth_failures = atomic_load(&server->auth_failures);
}
