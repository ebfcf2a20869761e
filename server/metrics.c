#include "server/metrics.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/strbuf.h"
#include "server/api_context.h"
#include "server/device_status.h"
#include "server/http_server.h"
#include "server/infer_client.h"
#include "server/supervisor.h"
#include "storage/jobs.h"

#define ROUTES_MAX 64
#define TEXT_MAX (1 << 20)
#define COUNT(a) (sizeof(a) / sizeof((a)[0]))

/* Seconds; the last bucket is +Inf. */
static const double buckets[] = {0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60};
static const int statuses[] = {200, 400, 401, 403, 404, 405, 413, 414,
                               415, 429, 431, 500, 501, 503, 507};

/* One route. The table only grows; a slot's name is written once, before it is published. */
struct route {
    _Atomic(const char *) operation;
    _Atomic int64_t by_status[COUNT(statuses) + 1]; /* the last: any other */
    _Atomic int64_t by_bucket[COUNT(buckets) + 1];  /* not cumulative */
    _Atomic int64_t microseconds;
};
static struct route routes[ROUTES_MAX];
static pthread_mutex_t routes_lock = PTHREAD_MUTEX_INITIALIZER;

static struct route *find_route(const char *operation)
{
    for (int i = 0; i < ROUTES_MAX; i++) {
        const char *name = atomic_load(&routes[i].operation);

        if (name == NULL)
            break;
        if (name == operation || strcmp(name, operation) == 0)
            return &routes[i];
    }
    return NULL;
}

static struct route *add_route(const char *operation)
{
    struct route *r;

    pthread_mutex_lock(&routes_lock);
    r = find_route(operation);
    for (int i = 0; r == NULL && i < ROUTES_MAX; i++) {
        if (atomic_load(&routes[i].operation) == NULL) {
            r = &routes[i];
            atomic_store(&r->operation, operation);
        }
    }
    pthread_mutex_unlock(&routes_lock);
    return r;
}

void metrics_count_request(const char *operation, int status, double seconds)
{
    const char *name = operation != NULL ? operation : "none";
    struct route *r = find_route(name);
    size_t s = 0, b = 0;

    if (r == NULL)
        r = add_route(name);
    if (r == NULL)
        return; /* more routes than the table of routes has */
    while (s < COUNT(statuses) && statuses[s] != status)
        s++;
    while (b < COUNT(buckets) && seconds > buckets[b])
        b++;
    atomic_fetch_add(&r->by_status[s], 1);
    atomic_fetch_add(&r->by_bucket[b], 1);
    atomic_fetch_add(&r->microseconds, (int64_t)(seconds * 1e6));
}

/* ------------------------------------------------------------------ text */

static void head(struct strbuf *out, const char *name, const char *type, const char *help)
{
    strbuf_addf(out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

static void value(struct strbuf *out, const char *name, const char *type, const char *help,
                  int64_t v)
{
    head(out, name, type, help);
    strbuf_addf(out, "%s %lld\n", name, (long long)v);
}

static void put_requests(struct strbuf *out)
{
    head(out, "graft_http_requests_total", "counter", "Answered requests by route and status.");
    for (int i = 0; i < ROUTES_MAX && atomic_load(&routes[i].operation) != NULL; i++) {
        for (size_t s = 0; s <= COUNT(statuses); s++) {
            long long n = atomic_load(&routes[i].by_status[s]);
            char status[16] = "other";

            if (n == 0)
                continue;
            if (s < COUNT(statuses))
                snprintf(status, sizeof status, "%d", statuses[s]);
            strbuf_addf(out, "graft_http_requests_total{route=\"%s\",status=\"%s\"} %lld\n",
                        atomic_load(&routes[i].operation), status, n);
        }
    }
}

static void put_latency(struct strbuf *out)
{
    head(out, "graft_http_request_seconds", "histogram",
         "From complete headers to the end of the answer.");
    for (int i = 0; i < ROUTES_MAX && atomic_load(&routes[i].operation) != NULL; i++) {
        const char *name = atomic_load(&routes[i].operation);
        long long sum = 0;

        for (size_t b = 0; b <= COUNT(buckets); b++) {
            char le[16] = "+Inf";

            sum += atomic_load(&routes[i].by_bucket[b]);
            if (b < COUNT(buckets))
                snprintf(le, sizeof le, "%g", buckets[b]);
            strbuf_addf(out, "graft_http_request_seconds_bucket{route=\"%s\",le=\"%s\"} %lld\n",
                        name, le, sum);
        }
        strbuf_addf(out, "graft_http_request_seconds_sum{route=\"%s\"} %.6f\n", name,
                    1e-6 * (double)atomic_load(&routes[i].microseconds));
        strbuf_addf(out, "graft_http_request_seconds_count{route=\"%s\"} %lld\n", name, sum);
    }
}

static void put_server(struct strbuf *out, struct http_server *server)
{
    struct http_server_stats s;

    if (server == NULL)
        return;
    http_server_stats(server, &s);
    value(out, "graft_http_connections", "gauge", "Open client connections.", s.connections);
    value(out, "graft_http_queued", "gauge", "Complete requests that wait for a handler.",
          s.queued);
    value(out, "graft_http_handling", "gauge", "Requests in a handler.", s.handling);
    value(out, "graft_http_streams", "gauge", "Answers that are still being made.", s.streams);
    value(out, "graft_http_refused_malformed_total", "counter", "Requests the filter refused.",
          s.refused_filter);
    value(out, "graft_http_refused_busy_total", "counter", "Requests refused with a full queue.",
          s.refused_busy);
    value(out, "graft_http_cut_slow_total", "counter", "Connections cut at a deadline.",
          s.cut_slow);
    value(out, "graft_http_auth_failures_total", "counter", "Requests with a wrong key.",
          s.auth_failures);
}

static void put_workers(struct strbuf *out, struct supervisor *supervisor)
{
    struct supervisor_stats s;

    if (supervisor == NULL)
        return;
    supervisor_stats(supervisor, &s);
    head(out, "graft_workers", "gauge", "Worker processes alive.");
    strbuf_addf(out, "graft_workers{role=\"train\"} %d\ngraft_workers{role=\"infer\"} %d\n",
                s.train_workers, s.infer_workers);
    head(out, "graft_worker_restarts_total", "counter", "Dead workers that were started again.");
    strbuf_addf(out,
                "graft_worker_restarts_total{role=\"train\"} %lld\n"
                "graft_worker_restarts_total{role=\"infer\"} %lld\n",
                (long long)s.train_restarts, (long long)s.infer_restarts);
}

static void put_inference(struct strbuf *out, struct infer_client *infer)
{
    struct infer_client_stats s;

    if (infer == NULL)
        return;
    infer_client_stats(infer, &s);
    value(out, "graft_infer_ready", "gauge", "1 while the infer worker answers.", s.ready);
    value(out, "graft_infer_open_requests", "gauge", "Chat requests waiting or being answered.",
          s.open);
    value(out, "graft_infer_requests_total", "counter", "Chat requests that have ended.",
          s.requests);
    value(out, "graft_infer_tokens_total", "counter", "Tokens generated.", s.tokens);
    value(out, "graft_infer_bases_loaded", "gauge", "Base models in memory.", s.worker.bases);
    value(out, "graft_infer_base_bytes", "gauge", "Bytes of base models in memory.",
          s.worker.base_bytes);
    value(out, "graft_infer_deltas_loaded", "gauge", "Deltas in memory.", s.worker.deltas);
    value(out, "graft_infer_delta_bytes", "gauge", "Bytes of deltas in memory.",
          s.worker.delta_bytes);
}

/* Without a database the rest is still worth showing. */
static void put_jobs(struct strbuf *out, struct http_request *request)
{
    int64_t counts[JOB_STATE_COUNT];
    bool up =
        http_request_database(request, NULL) == 0 && jobs_count(request->db, counts, NULL) == 0;

    value(out, "graft_database_up", "gauge", "1 while the database answers.", up);
    if (!up)
        return;
    head(out, "graft_jobs", "gauge", "Fine-tuning jobs by state.");
    for (int i = 0; i < JOB_STATE_COUNT; i++)
        strbuf_addf(out, "graft_jobs{state=\"%s\"} %lld\n", job_state_text((enum job_state)i),
                    (long long)counts[i]);
}

static void labels(struct strbuf *out, const char *name, const struct device_status *s,
                   const char *more)
{
    strbuf_addf(out, "%s{device=\"%s\",role=\"%s\",worker=\"%d\"%s} ", name, s->device, s->role,
                s->worker, more);
}

static void put_memory(struct strbuf *out, const struct device_status *s)
{
    if (s->memory_bytes <= 0)
        return;
    labels(out, "graft_device_memory_bytes", s, ",kind=\"total\"");
    strbuf_addf(out, "%lld\n", (long long)s->memory_bytes);
    labels(out, "graft_device_memory_bytes", s, ",kind=\"free\"");
    strbuf_addf(out, "%lld\n", (long long)s->memory_free);
}

static void put_state(struct strbuf *out, const struct device_status *s)
{
    char state[32];

    snprintf(state, sizeof state, ",state=\"%s\"", s->state);
    labels(out, "graft_device_state", s, state);
    strbuf_addf(out, "1\n");
}

static void put_utilization(struct strbuf *out, const struct device_status *s)
{
    labels(out, "graft_device_utilization", s, "");
    strbuf_addf(out, "%.3f\n", s->utilization);
}

static void put_lost(struct strbuf *out, const struct device_status *s)
{
    labels(out, "graft_device_lost_total", s, "");
    strbuf_addf(out, "%lld\n", (long long)s->lost);
}

/* This server's devices: another's are in its own metrics. */
static void put_devices(struct strbuf *out, struct http_request *request)
{
    static const struct {
        const char *name, *type, *help;
        void (*put)(struct strbuf *out, const struct device_status *status);
    } families[] = {
        {"graft_device_memory_bytes", "gauge", "Memory of a worker's device.", put_memory},
        {"graft_device_utilization", "gauge",
         "Share of the last minute in which the worker computed.", put_utilization},
        {"graft_device_state", "gauge", "1 for the state that the worker is in.", put_state},
        {"graft_device_lost_total", "counter", "Times that a worker lost its device.", put_lost},
    };
    struct device_status_list list;
    bool up = http_request_database(request, NULL) == 0;

    if (device_status_collect(&list, request->api, up ? request->db : NULL, NULL, NULL) != 0 &&
        device_status_collect(&list, request->api, NULL, NULL, NULL) != 0)
        return;
    for (size_t f = 0; f < COUNT(families); f++) {
        head(out, families[f].name, families[f].type, families[f].help);
        for (int i = 0; i < list.count; i++) {
            if (list.items[i].ours)
                families[f].put(out, &list.items[i]);
        }
    }
    device_status_list_release(&list);
}

int metrics_get(struct http_request *request, struct http_response *response, struct err *err)
{
    struct strbuf out;
    size_t len;
    char *text;

    strbuf_init(&out, TEXT_MAX);
    put_requests(&out);
    put_latency(&out);
    put_server(&out, request->api->http);
    put_workers(&out, request->api->supervisor);
    put_inference(&out, request->api->infer);
    put_devices(&out, request);
    put_jobs(&out, request);
    text = strbuf_detach(&out, &len);
    if (text == NULL)
        return err_set(err, ERR_NO_MEMORY, "metrics: out of memory");
    return http_response_bytes(response, 200, "text/plain; version=0.0.4; charset=utf-8", text, len,
                               err);
}
