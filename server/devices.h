/* devices.h: which devices this server's workers run on: the setting `devices`, the names in it,
 * and the look at the machine that a child process takes.
 *
 * A name is cpu, cuda:N or shim:N; cuda and shim alone mean number 0. `auto` becomes every CUDA
 * device that can be used, else cpu. The shim (the test stand-in for a CUDA device) is never found,
 * it has to be named.
 *
 * The process that serves the API must never load CUDA: a driver that hangs or a fault in it would
 * take the API down. So the question "what is there?" is answered by `graft work --role probe`, a
 * short-lived process of the same binary that prints a JSON line for each device. */
#ifndef GRAFT_DEVICES_H
#define GRAFT_DEVICES_H

#include <stdbool.h>

#include "engine/base/err.h"
#include "engine/engine.h"

#define DEVICES_MAX ENGINE_MAX_DEVICES
#define DEVICE_NAME_SIZE 16
#define DEVICES_PROBE_SECONDS 60 /* a machine of eight GPUs wakes up in ten */

struct device_list {
    int count;
    char name[DEVICES_MAX][DEVICE_NAME_SIZE];
    char description[DEVICES_MAX][128]; /* of those that were looked at; "" */
};

/* One name, made canonical ("cuda" → "cuda:0"). ERR_INVALID says what is possible. */
int devices_name(const char *text, char out[DEVICE_NAME_SIZE], struct err *err);
bool devices_is_cpu(const char *name);
/* "auto" (an empty list), or names separated by commas. ERR_INVALID: a name that is none, or twice
 * the same. Looks at nothing. */
int devices_parse(const char *text, struct device_list *out, struct err *err);
int devices_index(const struct device_list *list, const char *name); /* -1: not in it */

/* What the setting's text means on this machine. `found`: what the probe saw. A named device that
 * is not there or not usable is ERR_INVALID with the reason. */
int devices_choose(const char *text, const struct engine_device *found, int found_count,
                   struct device_list *out, struct err *err);

/* Asks a child process for these devices, or (an empty list) for all there are: those of
 * engine_devices. ERR_UNAVAILABLE where it died, hung or said nothing that can be read: the message
 * says which. */
int devices_probe(const struct device_list *which, struct engine_device *out, int max, int *count,
                  struct err *err);
/* Both: what the text means here and now. The cpu alone is found without a child; and with `auto` a
 * driver that is broken is a warning in the log, no reason not to go on. */
int devices_find(const char *text, struct device_list *out, struct err *err);
/* The child's part: prints the lines. */
int devices_print(const struct device_list *which, struct err *err);

#endif
