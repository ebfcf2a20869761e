#include "engine/base/err.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "engine/base/utf8.h"

static void set_message(struct err *err, const char *fmt, va_list ap)
    __attribute__((format(printf, 2, 0)));
static void set_message(struct err *err, const char *fmt, va_list ap)
{
    vsnprintf(err->message, sizeof err->message, fmt, ap);
    utf8_scrub(err->message);
}

int err_set(struct err *err, enum err_kind kind, const char *fmt, ...)
{
    va_list ap;

    if (err == NULL || err->kind != ERR_NONE)
        return -1;
    err->kind = kind;
    err->code[0] = err->param[0] = '\0';
    va_start(ap, fmt);
    set_message(err, fmt, ap);
    va_end(ap);
    return -1;
}

int err_set_code(struct err *err, enum err_kind kind, const char *code, const char *param,
                 const char *fmt, ...)
{
    va_list ap;

    if (err == NULL || err->kind != ERR_NONE)
        return -1;
    err->kind = kind;
    snprintf(err->code, sizeof err->code, "%s", code ? code : "");
    snprintf(err->param, sizeof err->param, "%s", param ? param : "");
    va_start(ap, fmt);
    set_message(err, fmt, ap);
    va_end(ap);
    return -1;
}

int err_set_errno(struct err *err, int errnum, const char *fmt, ...)
{
    va_list ap;
    char text[128];
    size_t n;

    if (err == NULL || err->kind != ERR_NONE)
        return -1;
    err->kind = errnum == ENOSPC || errnum == EDQUOT || errnum == EFBIG ? ERR_NO_SPACE
                : errnum == ENOMEM                                      ? ERR_NO_MEMORY
                                                                        : ERR_IO;
    err->code[0] = err->param[0] = '\0';
    va_start(ap, fmt);
    set_message(err, fmt, ap);
    va_end(ap);
    n = strlen(err->message);
    snprintf(err->message + n, sizeof err->message - n, ": %s",
             strerror_r(errnum, text, sizeof text));
    return -1;
}

int err_prefix(struct err *err, const char *fmt, ...)
{
    va_list ap;
    char old[sizeof err->message];
    size_t n;

    if (err == NULL || err->kind == ERR_NONE)
        return -1;
    memcpy(old, err->message, sizeof old);
    va_start(ap, fmt);
    set_message(err, fmt, ap);
    va_end(ap);
    n = strlen(err->message);
    snprintf(err->message + n, sizeof err->message - n, ": %s", old);
    utf8_scrub(err->message);
    return -1;
}

void err_clear(struct err *err)
{
    if (err != NULL)
        memset(err, 0, sizeof *err);
}

bool err_is_set(const struct err *err)
{
    return err != NULL && err->kind != ERR_NONE;
}
