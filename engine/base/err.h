/* err.h: one error, on the caller's stack. The first error wins: setting an error that is already
 * set keeps the first, so that a cleanup path can not hide the cause.
 *
 * A function that can fail takes `struct err *err` last and returns 0 or -1. `err` may be NULL
 * where the caller does not want the text. `assert` is for our own bugs, `err` for the world.
 *
 * The message is for the person who must act: lower case, names the thing and what to do, e.g.
 *   training file "file-abc": line 17: "messages" is missing
 * It is always valid UTF-8, whatever was formatted into it or cut: it may go to a database as it
 * is. `code` and `param` go to the wire as they are (api-spec/errors.md); empty means null. */
#ifndef GRAFT_BASE_ERR_H
#define GRAFT_BASE_ERR_H

#include <stdbool.h>

enum err_kind {
    ERR_NONE = 0,
    ERR_INTERNAL,    /* our bug, or a dependency that broke its promise: 500 */
    ERR_INVALID,     /* the caller's input is wrong: 400, or a failed job */
    ERR_AUTH,        /* no key or a wrong one: 401 */
    ERR_FORBIDDEN,   /* 403 */
    ERR_NOT_FOUND,   /* 404 */
    ERR_TOO_LARGE,   /* 413 */
    ERR_RATE,        /* 429: try again later */
    ERR_UNAVAILABLE, /* 503: database away, worker restarting; try again */
    ERR_IO,          /* a file or socket operation failed: 500 */
    ERR_NO_SPACE,    /* disk or quota full: 507 on the wire, a failed job */
    ERR_NO_MEMORY,   /* 503 */
    ERR_FENCED,      /* this attempt of a job is no longer the owner: stop, touch nothing */
    ERR_CANCELLED,   /* asked to stop */
    ERR_DEVICE,      /* the device is lost to this process, which must end: another may go on */
};

struct err {
    enum err_kind kind;
    char code[48];
    char param[64];
    char message[1024];
};

/* All set err only if it is not set yet, and return -1, so that `return err_set(...)` reads well.
 */
int err_set(struct err *err, enum err_kind kind, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
int err_set_code(struct err *err, enum err_kind kind, const char *code, const char *param,
                 const char *fmt, ...) __attribute__((format(printf, 5, 6)));
/* From errno: ENOSPC, EDQUOT and EFBIG become ERR_NO_SPACE, ENOMEM ERR_NO_MEMORY, else ERR_IO. The
 * text of errno is appended after a colon. */
int err_set_errno(struct err *err, int errnum, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* Put "what: " in front of the message of an error that is set; keeps kind, code and param. */
int err_prefix(struct err *err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void err_clear(struct err *err);
bool err_is_set(const struct err *err);

#endif
