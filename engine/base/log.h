/* log.h: one line per event on standard error: time, level, component, message.
 *
 * Never give it a key, a prompt or a training text; ids and sizes are fine. Thread-safe: each call
 * is one write(2), one line: line ends and other control characters inside do not get through. */
#ifndef GRAFT_BASE_LOG_H
#define GRAFT_BASE_LOG_H

enum log_level { LOG_LEVEL_DEBUG, LOG_LEVEL_INFO, LOG_LEVEL_WARN, LOG_LEVEL_ERROR };

/* component: "serve", "train", "infer", …; a static string, kept. Call before threads start. */
void log_setup(const char *component, enum log_level min);
void log_line(enum log_level level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#define log_debug(...) log_line(LOG_LEVEL_DEBUG, __VA_ARGS__)
#define log_info(...) log_line(LOG_LEVEL_INFO, __VA_ARGS__)
#define log_warn(...) log_line(LOG_LEVEL_WARN, __VA_ARGS__)
#define log_error(...) log_line(LOG_LEVEL_ERROR, __VA_ARGS__)

#endif
