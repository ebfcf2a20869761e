/* cmd.h: the subcommands of the program, in one table (cmd.c).
 *
 * Exit codes: 0 done, 1 failed (the reason is on standard error), 2 wrong usage; of a worker also
 * 75 its device is lost, 76 its device was silent for --watchdog seconds. Whoever runs `graft work`
 * by hand starts it again after those two: only a new process can have the device back. Results go
 * to standard output, everything else to standard error. */
#ifndef GRAFT_CMD_H
#define GRAFT_CMD_H

#include "engine/base/err.h"
#include "engine/base/log.h"
#include "server/settings.h"

#define GRAFT_VERSION "0.1.0"

#define CMD_DONE 0
#define CMD_FAILED 1
#define CMD_USAGE 2
#define CMD_DEVICE_LOST 75
#define CMD_DEVICE_STUCK 76

struct cmd {
    const char *name;      /* one or two words: "serve", "key create" */
    const char *arguments; /* of the usage line, behind the name */
    const char *summary;   /* one line, for the list */
    const char *text;      /* more, for `graft help NAME`; NULL: nothing */
    struct setting_spec spec;
    /* Returns a CMD_ code; with CMD_FAILED or CMD_USAGE, err has the reason. */
    int (*run)(const struct settings *settings, const struct setting_args *args, struct err *err);
};

extern const struct cmd cmd_table[];
extern const size_t cmd_count;

int cmd_main(int argc, char **argv);
enum log_level cmd_log_level(const struct settings *settings);

/* The commands. Indices of their options are beside their tables in cmd.c. */
typedef int cmd_fn(const struct settings *settings, const struct setting_args *args,
                   struct err *err);
cmd_fn cmd_serve, cmd_work, cmd_migrate, cmd_key_create, cmd_key_list, cmd_key_revoke,
    cmd_model_import, cmd_model_list, cmd_collect, cmd_doctor, cmd_bench_train, cmd_bench_decode,
    cmd_bench_recall, cmd_bench_kl, cmd_bench_apply, cmd_delta_compress, cmd_delta_inspect,
    cmd_delta_apply;

enum { CMD_WORK_ROLE, CMD_WORK_DEVICE, CMD_WORK_LIFELINE, CMD_WORK_SOCKET, CMD_WORK_WORDS };
enum { CMD_KEY_ORG, CMD_KEY_PROJECT };
enum { CMD_MODEL_NAME };
enum { CMD_DOCTOR_JSON };
enum { CMD_INSPECT_PLOT };
enum { CMD_APPLY_BASE, CMD_APPLY_DELTA, CMD_APPLY_OUT };
enum {
    CMD_DELTA_BASE,
    CMD_DELTA_TUNED,
    CMD_DELTA_OUT,
    CMD_DELTA_CODEC,
    CMD_DELTA_RATIO,
    CMD_DELTA_BYTES,
    CMD_DELTA_MAX_KL,
    CMD_DELTA_CALIBRATION,
    CMD_DELTA_HELD_OUT,
    CMD_DELTA_DISTILL,
    CMD_DELTA_SEED,
    CMD_DELTA_DEVICE,
    CMD_DELTA_RESUME,
    CMD_DELTA_NO_RECALL
};
enum {
    CMD_BENCH_MODEL,
    CMD_BENCH_DEVICE,
    CMD_BENCH_SEQ,
    CMD_BENCH_BATCH,
    CMD_BENCH_STEPS,
    CMD_BENCH_EMBEDDINGS
};
enum {
    CMD_DECODE_MODEL,
    CMD_DECODE_DEVICE,
    CMD_DECODE_BATCH,
    CMD_DECODE_TENANTS,
    CMD_DECODE_PROMPT,
    CMD_DECODE_TOKENS,
    CMD_DECODE_CODEC,
    CMD_DECODE_RATIO
};
enum { CMD_APPLY_ROWS, CMD_APPLY_COLS, CMD_APPLY_CODEC, CMD_APPLY_RATIO, CMD_APPLY_KERNELS };
enum { CMD_RECALL_MODEL, CMD_RECALL_DELTA, CMD_RECALL_DATA, CMD_RECALL_DEVICE };
enum {
    CMD_KL_BASE,
    CMD_KL_TUNED,
    CMD_KL_DELTA,
    CMD_KL_OTHER,
    CMD_KL_DATA,
    CMD_KL_TOKENS,
    CMD_KL_DEVICE
};

#endif
