/* ids.h: names of things as clients see them: a prefix and 24 random base-62 characters (142 bits
 * from OpenSSL's RAND_bytes). The server makes every id; a client never chooses one, because a
 * collision would tell one tenant what another has. */
#ifndef GRAFT_STORAGE_IDS_H
#define GRAFT_STORAGE_IDS_H

#include <stdbool.h>
#include <stddef.h>

#include "engine/base/err.h"

#define ID_SIZE 40   /* any id with its NUL */
#define UUID_SIZE 37 /* a project (= tenant) id with its NUL */

#define ID_JOB "ftjob-"
#define ID_EVENT "ftevent-"
#define ID_CHECKPOINT "ftckpt_"
#define ID_FILE "file-"
#define ID_ORGANIZATION "org-"
#define ID_KEY "key_"
#define ID_WORKER "worker-"
#define ID_WEBHOOK_EVENT "evt_"

int id_new(const char *prefix, char out[ID_SIZE], struct err *err);
/* True where `text` has the shape of an id with this prefix. The API answers 404 without asking the
 * database where it has not, in the same words as for an id that is not there. */
bool id_has_shape(const char *prefix, const char *text);
/* `count` random base-62 characters and a NUL into out[count + 1]. */
int id_random(size_t count, char *out, struct err *err);

#endif
