#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/log.h"
#include "server/cmd.h"
#include "server/devices.h"
#include "server/worker.h"
#include "server/worker_watch.h"

/* An inherited descriptor from its number; -1 where the option was not given. */
static int descriptor(const char *text, const char *flag, int *out, struct err *err)
{
    char *end;
    long v;

    *out = -1;
    if (text == NULL)
        return 0;
    v = strtol(text, &end, 10);
    if (end == text || *end != '\0' || v < 0 || v > 1 << 20 || fcntl((int)v, F_GETFD) < 0)
        return err_set(err, ERR_INVALID, "%s: \"%s\" is no open descriptor", flag, text);
    *out = (int)v;
    return 0;
}

struct roles {
    bool train, infer, probe;
};

static int read_role(const char *text, struct roles *out, struct err *err)
{
    *out = (struct roles){.train = text != NULL && strcmp(text, "train") == 0,
                          .infer = text != NULL && strcmp(text, "infer") == 0,
                          .probe = text != NULL && strcmp(text, "probe") == 0};
    if (!out->train && !out->infer && !out->probe)
        return err_set(err, ERR_INVALID, "--role must be train, infer or probe");
    return 0;
}

/* --device: of a worker one, of a probe those to look at, or all there is. */
static int read_devices(const char *text, bool probe, struct device_list *out, struct err *err)
{
    *out = (struct device_list){0};
    if (text == NULL)
        return 0;
    if (devices_parse(text, out, err) != 0)
        return err_prefix(err, "--device");
    if (!probe && out->count != 1)
        return err_set(err, ERR_INVALID, "--device: name the one device of this worker");
    return 0;
}

/* A worker that was started by hand and is given no device takes the first of those that `serve`
 * would take. */
static int take_first(const struct settings *settings, struct device_list *out, struct err *err)
{
    if (devices_find(settings->devices, out, err) != 0)
        return err_prefix(err, "--devices");
    if (out->count > 1)
        log_warn(
            "%d devices can be used, a worker has one: taking %s; start one more for each with "
            "--device",
            out->count, out->name[0]);
    return 0;
}

/* A lost device ends the process without a way back: worker_watch_lost. */
static int run_worker(const struct settings *settings, bool infer, const char *device,
                      const int fds[3], struct err *err)
{
    const struct worker_watch_options watch = {
        .device = device, .seconds = settings->watchdog, .words_fd = fds[2]};
    int rc;

    log_setup(infer ? "infer" : "train", cmd_log_level(settings));
    if (worker_setup(fds[0], err) != 0 || worker_watch_start(&watch, err) != 0)
        return -1;
    if (fds[2] >= 0)
        fcntl(fds[2], F_SETFD, FD_CLOEXEC);
    rc = infer ? worker_infer_run(settings, device, fds[1], err)
               : worker_train_run(settings, device, err);
    if (rc != 0 && err->kind == ERR_DEVICE)
        worker_watch_lost(err);
    return rc;
}

int cmd_work(const struct settings *settings, const struct setting_args *args, struct err *err)
{
    static struct device_list devices; /* the watchdog's thread reads it until the end */
    struct roles role;
    int fds[3];

    if (read_role(args->options[CMD_WORK_ROLE], &role, err) != 0 ||
        read_devices(args->options[CMD_WORK_DEVICE], role.probe, &devices, err) != 0 ||
        descriptor(args->options[CMD_WORK_LIFELINE], "--lifeline-fd", &fds[0], err) != 0 ||
        descriptor(args->options[CMD_WORK_SOCKET], "--socket-fd", &fds[1], err) != 0 ||
        descriptor(args->options[CMD_WORK_WORDS], "--words-fd", &fds[2], err) != 0)
        return CMD_USAGE;
    if (role.probe)
        return devices_print(&devices, err) == 0 ? CMD_DONE : CMD_FAILED;
    if (role.infer && fds[1] < 0) {
        err_set(err, ERR_INVALID, "an infer worker is started by `graft serve`, not by hand");
        return CMD_USAGE;
    }
    if (devices.count == 0 && take_first(settings, &devices, err) != 0)
        return CMD_FAILED;
    return run_worker(settings, role.infer, devices.name[0], fds, err) == 0 ? CMD_DONE : CMD_FAILED;
}
