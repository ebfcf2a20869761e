#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/log.h"
#include "server/cmd.h"
#include "server/worker.h"

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

int cmd_work(const struct settings *settings, const struct setting_args *args, struct err *err)
{
    const char *role = args->options[CMD_WORK_ROLE];
    int lifeline, socket_fd, rc;

    if (role == NULL || (strcmp(role, "train") != 0 && strcmp(role, "infer") != 0)) {
        err_set(err, ERR_INVALID, "--role must be train or infer");
        return CMD_USAGE;
    }
    if (descriptor(args->options[CMD_WORK_LIFELINE], "--lifeline-fd", &lifeline, err) != 0 ||
        descriptor(args->options[CMD_WORK_SOCKET], "--socket-fd", &socket_fd, err) != 0)
        return CMD_USAGE;
    if (strcmp(role, "infer") == 0 && socket_fd < 0) {
        err_set(err, ERR_INVALID, "an infer worker is started by `graft serve`, not by hand");
        return CMD_USAGE;
    }
    log_setup(strcmp(role, "infer") == 0 ? "infer" : "train", cmd_log_level(settings));
    if (worker_setup(lifeline, err) != 0)
        return CMD_FAILED;
    rc = strcmp(role, "infer") == 0 ? worker_infer_run(settings, socket_fd, err)
                                    : worker_train_run(settings, err);
    return rc == 0 ? CMD_DONE : CMD_FAILED;
}
