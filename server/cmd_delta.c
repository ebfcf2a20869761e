#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/engine.h"
#include "server/cmd.h"
#include "server/delta_plot.h"
#include "server/delta_report.h"

/* ------------------------------------------------------------------ progress */

#define BAR 24

static volatile sig_atomic_t interrupted; /* by which signal */

static void interrupt(int signo)
{
    interrupted = signo;
}

/* The first Ctrl-C lets the compression clean up behind itself, the second ends the process. */
static void catch_signals(void)
{
    static const int signals[] = {SIGINT, SIGTERM, SIGHUP};
    const struct sigaction action = {.sa_handler = interrupt, .sa_flags = (int)SA_RESETHAND};

    for (size_t i = 0; i < sizeof signals / sizeof signals[0]; i++)
        sigaction(signals[i], &action, NULL);
}

/* Whoever waits for us is to see what ended us. */
static void end_as_asked(void)
{
    if (!interrupted)
        return;
    signal(interrupted, SIG_DFL);
    raise(interrupted);
}

/* A bar that is drawn over on a terminal; elsewhere a line for each stage. */
static bool show_progress(void *context, const char *stage, double share)
{
    char *last = context; /* [32] the stage before */
    bool terminal = isatty(STDERR_FILENO), new = strcmp(last, stage) != 0;
    char bar[BAR + 1];

    snprintf(last, 32, "%s", stage);
    if (!terminal) {
        if (new)
            fprintf(stderr, "%s\n", stage);
        return !interrupted;
    }
    for (int i = 0; i < BAR; i++)
        bar[i] = i < (int)(share * BAR + 0.5) ? '#' : '.';
    bar[BAR] = '\0';
    fprintf(stderr, "\r\x1b[K%-11s [%s] %3.0f %%", stage, bar, share * 100);
    fflush(stderr);
    return !interrupted;
}

static void end_progress(const char *last)
{
    if (*last && isatty(STDERR_FILENO))
        fprintf(stderr, "\r\x1b[K");
}

/* ------------------------------------------------------------------ compress */

#define RECALL_QUESTIONS 100 /* each is asked three times */

static void print_report(const struct engine_delta_report *report, const char *path)
{
    json_t *out = delta_report_object(report);

    json_object_set_new(out, "recall",
                        report->recall_asked > 0
                            ? json_pack("{s:I, s:f, s:f, s:f}", "asked",
                                        (json_int_t)report->recall_asked, "base",
                                        report->base_recall, "tuned", report->tuned_recall,
                                        "served", report->served_recall)
                            : json_null());
    json_object_set_new(out, "file", json_string(path));
    json_dumpf(out, stdout, JSON_COMPACT | JSON_REAL_PRECISION(6));
    putchar('\n');
    json_decref(out);
}

static int number_of(const struct setting_args *args, int option, const char *flag, double low,
                     double high, double *out, struct err *err)
{
    const char *text = args->options[option];
    char *end;

    if (text == NULL)
        return 0;
    errno = 0;
    *out = strtod(text, &end);
    if (end == text || *end != '\0' || errno != 0 || !(*out >= low && *out <= high))
        return err_set(err, ERR_INVALID, "%s: \"%s\" is not a number from %g to %g", flag, text,
                       low, high);
    return 0;
}

static int whole_number_of(const struct setting_args *args, int option, const char *flag,
                           double low, double high, double *out, struct err *err)
{
    if (number_of(args, option, flag, low, high, out, err) != 0)
        return -1;
    if (args->options[option] != NULL && *out != floor(*out))
        return err_set(err, ERR_INVALID, "%s: \"%s\" is not a whole number", flag,
                       args->options[option]);
    return 0;
}

static int compress_options(const struct setting_args *args, struct engine_compress_options *o,
                            struct err *err)
{
    double bytes = 0, steps = -1, seed = 0;

    o->codec = args->options[CMD_DELTA_CODEC];
    if (o->codec != NULL && !engine_codec_known(o->codec))
        return err_set(err, ERR_INVALID, "--codec: there is no codec \"%s\": %s", o->codec,
                       engine_codec_names());
    if (number_of(args, CMD_DELTA_RATIO, "--ratio", 1, 1024, &o->ratio, err) != 0 ||
        whole_number_of(args, CMD_DELTA_BYTES, "--bytes", 1, 1e13, &bytes, err) != 0 ||
        number_of(args, CMD_DELTA_MAX_KL, "--max-kl", 1e-9, 1e3, &o->max_kl, err) != 0 ||
        whole_number_of(args, CMD_DELTA_DISTILL, "--distill-steps", 0, 10000, &steps, err) != 0 ||
        whole_number_of(args, CMD_DELTA_SEED, "--seed", 0, 1e15, &seed, err) != 0)
        return -1;
    o->resume = args->options[CMD_DELTA_RESUME] != NULL;
    o->bytes = (int64_t)bytes;
    o->distill_steps = (int32_t)steps;
    o->seed = (int64_t)seed;
    return 0;
}

/* JSONL of examples; NULL: none. What is wrong with them is told in a job's words, which know
 * nothing of our files. */
static int open_rows(struct engine_dataset **out, const struct engine *engine, const char *flag,
                     const char *path, struct engine_dataset_report *report, struct err *err)
{
    const struct engine_dataset_options options = {.file_id = path, .validation = true};

    *out = NULL;
    *report = (struct engine_dataset_report){0};
    if (path == NULL || engine_dataset_open(out, engine, path, &options, report, err) == 0)
        return 0;
    return err_prefix(err, "%s %s", flag, path);
}

static int compress(const struct settings *settings, const struct setting_args *args,
                    struct engine_compress_options *options, struct err *err)
{
    const struct engine_options device = {.device = args->options[CMD_DELTA_DEVICE],
                                          .threads = (int32_t)settings->threads,
                                          .precision = settings_precision(settings)};
    struct engine_dataset *calibration = NULL, *held_out = NULL;
    struct engine *engine = NULL;
    struct engine_dataset_report rows, others;
    struct engine_delta_report report;
    char stage[32] = "";
    int rc = -1;

    options->progress = show_progress;
    options->context = stage;
    catch_signals(); /* an import has temporary files, too */
    if (engine_open_model(&engine, args->options[CMD_DELTA_BASE], &device, err) != 0 ||
        interrupted ||
        open_rows(&calibration, engine, "--calibration", args->options[CMD_DELTA_CALIBRATION],
                  &rows, err) != 0 ||
        open_rows(&held_out, engine, "--held-out", args->options[CMD_DELTA_HELD_OUT], &others,
                  err) != 0)
        goto out;
    options->calibration = calibration;
    options->held_out = held_out;
    if (rows.question_answer && args->options[CMD_DELTA_NO_RECALL] == NULL)
        options->recall_questions = RECALL_QUESTIONS;
    rc = engine_model_compress(engine, args->options[CMD_DELTA_TUNED], options,
                               args->options[CMD_DELTA_OUT], &report, err);
    end_progress(stage);
    if (rc == 0)
        print_report(&report, args->options[CMD_DELTA_OUT]);
out:
    engine_dataset_free(calibration);
    engine_dataset_free(held_out);
    engine_free(engine);
    if (rc != 0)
        end_as_asked();
    return rc;
}

static int require(const struct setting_args *args, int option, const char *flag, struct err *err)
{
    return args->options[option] != NULL ? 0 : err_set(err, ERR_INVALID, "%s is missing", flag);
}

int cmd_delta_compress(const struct settings *settings, const struct setting_args *args,
                       struct err *err)
{
    struct engine_compress_options options = {0};

    if (require(args, CMD_DELTA_BASE, "--base", err) != 0 ||
        require(args, CMD_DELTA_TUNED, "--tuned", err) != 0 ||
        require(args, CMD_DELTA_OUT, "-o", err) != 0 || compress_options(args, &options, err) != 0)
        return CMD_USAGE;
    return compress(settings, args, &options, err) == 0 ? CMD_DONE : CMD_FAILED;
}

/* ------------------------------------------------------------------ inspect */

int cmd_delta_inspect(const struct settings *settings, const struct setting_args *args,
                      struct err *err)
{
    const char *plot = args->options[CMD_INSPECT_PLOT];
    char *json;
    int rc;

    if (engine_delta_describe(args->args[0], &json, err) != 0)
        return CMD_FAILED;
    printf("%s\n", json);
    rc = plot != NULL ? delta_plot(json, plot, err) : 0;
    free(json);
    return rc == 0 ? CMD_DONE : CMD_FAILED;
}

/* ------------------------------------------------------------------ apply */

int cmd_delta_apply(const struct settings *settings, const struct setting_args *args,
                    struct err *err)
{
    const char *out = args->options[CMD_APPLY_OUT];

    if (require(args, CMD_APPLY_BASE, "--base", err) != 0 ||
        require(args, CMD_APPLY_DELTA, "--delta", err) != 0 ||
        require(args, CMD_APPLY_OUT, "-o", err) != 0)
        return CMD_USAGE;
    if (engine_delta_apply(args->options[CMD_APPLY_BASE], args->options[CMD_APPLY_DELTA], out,
                           err) != 0)
        return CMD_FAILED;
    printf("{\"directory\":");
    json_t *name = json_string(out);
    json_dumpf(name, stdout, JSON_ENCODE_ANY);
    json_decref(name);
    printf("}\n");
    return CMD_DONE;
}
