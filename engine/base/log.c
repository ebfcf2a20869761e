#include "engine/base/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const char *component = "graft";
static enum log_level min_level = LOG_LEVEL_INFO;

void log_setup(const char *name, enum log_level min)
{
    component = name;
    min_level = min;
}

/* A line is one event, whatever was formatted into it (a database's message has several, a client's
 * text may have escapes for the terminal that shows the log). */
static void flatten(char *text, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        unsigned char c = (unsigned char)text[i];

        if (c == '\n' || c == '\r' || c == '\t')
            text[i] = ' ';
        else if (c < ' ' || c == 0x7f)
            text[i] = '?';
    }
}

void log_line(enum log_level level, const char *fmt, ...)
{
    static const char *const name[] = {"debug", "info", "warn", "error"};
    char line[2048];
    struct timespec now;
    struct tm utc;
    va_list ap;
    size_t n;
    int k;

    if (level < min_level)
        return;
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    n = strftime(line, sizeof line, "%Y-%m-%dT%H:%M:%S", &utc);
    k = snprintf(line + n, sizeof line - n, ".%03ldZ %s %s: ", now.tv_nsec / 1000000, name[level],
                 component);
    n += (size_t)k;
    va_start(ap, fmt);
    k = vsnprintf(line + n, sizeof line - n - 1, fmt, ap);
    va_end(ap);
    if (k > 0)
        n += (size_t)k < sizeof line - n - 1 ? (size_t)k : sizeof line - n - 2;
    flatten(line, n);
    line[n++] = '\n';
    /* A log line that can not be written has nowhere to be reported. */
    if (write(STDERR_FILENO, line, n) < 0)
        return;
}
