/* events.h: what a job tells: an append-only list per job, numbered 1, 2, 3 without gaps. */
#ifndef GRAFT_STORAGE_EVENTS_H
#define GRAFT_STORAGE_EVENTS_H

#include <stdbool.h>
#include <stdint.h>

#include "storage/db.h"
#include "storage/leases.h"

struct event {
    char id[ID_SIZE];
    int64_t sequence; /* 1.. within the job */
    int64_t created_at;
    char level[8]; /* info, warn, error */
    char type[16]; /* message, metrics */
    char *message;
    char *data; /* JSON text of an object; "{}" for messages */
};

struct event_new {
    const char *level;   /* NULL: info */
    const char *type;    /* NULL: message */
    const char *message; /* UTF-8 */
    const char *data;    /* JSON text of an object; NULL: {} */
    /* Makes it once: a second event of the job with this key is dropped silently, so that a resumed
     * attempt may tell again what it told ("step:17"). NULL: always appended. ≤ 64 bytes. */
    const char *key;
};

struct event_list {
    struct event *items;
    int count;
    bool has_more;
};
void event_list_release(struct event_list *list);

/* All or none, in this order, in one transaction. ERR_FENCED where the lease is not ours. */
int events_append(struct db *db, const struct lease *lease, const struct event_new *events,
                  int count, struct err *err);
/* Newest first. `after`: an event id of this job (then older than it) or NULL; unknown:
 * ERR_INVALID, param after. An absent job is ERR_NOT_FOUND as jobs_get says it. limit 1..100 is the
 * caller's. */
int events_list(struct db *db, const char *project, const char *job, const char *after, int limit,
                struct event_list *out, struct err *err);
/* Oldest first, sequence > `since`: for a follower that shows them as they come. */
int events_since(struct db *db, const char *project, const char *job, int64_t since, int limit,
                 struct event_list *out, struct err *err);

/* For the other modules of storage, inside a transaction of the project that has locked the job's
 * lease row: one event, without a fence of its own. */
int events_write(struct db *db, const char *project, const char *job, const struct event_new *event,
                 struct err *err);

#endif
