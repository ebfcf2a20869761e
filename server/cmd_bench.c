#include <limits.h>
#include <stdio.h>
#include <stdlib.h>

#include "engine/engine.h"
#include "server/cmd.h"

/* 0 may be said where it is what is taken without the option. */
static int count_of(const struct setting_args *args, int option, const char *flag, int32_t fallback,
                    int32_t *out, struct err *err)
{
    const char *text = args->options[option];
    int32_t least = fallback < 1 ? fallback : 1;
    char *end;
    long v;

    *out = fallback;
    if (text == NULL)
        return 0;
    v = strtol(text, &end, 10);
    if (end == text || *end != '\0' || v < least || v > 1 << 20)
        return err_set(err, ERR_INVALID, "%s: \"%s\" is not a count from %d to 1048576", flag, text,
                       least);
    *out = (int32_t)v;
    return 0;
}

static int ratio_of(const struct setting_args *args, int option, double *out, struct err *err)
{
    const char *text = args->options[option];
    char *end;

    *out = 0;
    if (text == NULL)
        return 0;
    *out = strtod(text, &end);
    if (end == text || *end != '\0' || !(*out >= 1 && *out <= 1024))
        return err_set(err, ERR_INVALID, "--ratio: \"%s\" is not a number from 1 to 1024", text);
    return 0;
}

int cmd_bench_train(const struct settings *settings, const struct setting_args *args,
                    struct err *err)
{
    struct engine_bench_train_options options = {
        .model = args->options[CMD_BENCH_MODEL],
        .device = args->options[CMD_BENCH_DEVICE],
        .threads = (int32_t)settings->threads,
        .precision = settings_precision(settings),
        .train_embeddings = args->options[CMD_BENCH_EMBEDDINGS] != NULL,
    };
    char json[2048];

    if (options.model == NULL) {
        err_set(err, ERR_INVALID, "--model is missing");
        return CMD_USAGE;
    }
    if (options.device == NULL)
        options.device = "cpu";
    if (count_of(args, CMD_BENCH_SEQ, "--seq", 512, &options.sequence, err) != 0 ||
        count_of(args, CMD_BENCH_BATCH, "--batch", 2, &options.batch, err) != 0 ||
        count_of(args, CMD_BENCH_STEPS, "--steps", 5, &options.steps, err) != 0)
        return CMD_USAGE;
    if (engine_bench_train(&options, json, sizeof json, err) != 0)
        return CMD_FAILED;
    printf("%s\n", json);
    return CMD_DONE;
}

int cmd_bench_decode(const struct settings *settings, const struct setting_args *args,
                     struct err *err)
{
    struct engine_bench_decode_options options = {
        .model = args->options[CMD_DECODE_MODEL],
        .codec = args->options[CMD_DECODE_CODEC],
        .device = args->options[CMD_DECODE_DEVICE],
        .threads = (int32_t)settings->threads,
        .precision = settings_precision(settings),
    };
    char json[2048];

    if (options.model == NULL) {
        err_set(err, ERR_INVALID, "--model is missing");
        return CMD_USAGE;
    }
    if (options.device == NULL)
        options.device = "cpu";
    if (count_of(args, CMD_DECODE_BATCH, "--batch", 1, &options.sequences, err) != 0 ||
        count_of(args, CMD_DECODE_TENANTS, "--tenants", 0, &options.tenants, err) != 0 ||
        count_of(args, CMD_DECODE_PROMPT, "--prompt", 64, &options.prompt, err) != 0 ||
        count_of(args, CMD_DECODE_TOKENS, "--tokens", 64, &options.tokens, err) != 0 ||
        ratio_of(args, CMD_DECODE_RATIO, &options.ratio, err) != 0)
        return CMD_USAGE;
    if (engine_bench_decode(&options, json, sizeof json, err) != 0)
        return CMD_FAILED;
    printf("%s\n", json);
    return CMD_DONE;
}

/* ------------------------------------------------------------------ recall and KL */

static int require(const struct setting_args *args, int option, const char *flag, struct err *err)
{
    return args->options[option] != NULL ? 0 : err_set(err, ERR_INVALID, "%s is missing", flag);
}

/* The file of --data and those behind the options. Returns how many. */
static int32_t data_of(const struct setting_args *args, int option,
                       const char *data[ENGINE_BENCH_MAX_DATA])
{
    data[0] = args->options[option];
    for (int i = 0; i < args->arg_count; i++)
        data[i + 1] = args->args[i];
    return args->arg_count + 1;
}

static const char *device_of(const struct setting_args *args, int option)
{
    return args->options[option] != NULL ? args->options[option] : "cpu";
}

int cmd_bench_recall(const struct settings *settings, const struct setting_args *args,
                     struct err *err)
{
    const char *data[ENGINE_BENCH_MAX_DATA];
    struct engine_bench_recall_options options = {
        .model = args->options[CMD_RECALL_MODEL],
        .delta = args->options[CMD_RECALL_DELTA],
        .device = device_of(args, CMD_RECALL_DEVICE),
        .data = data,
        .data_count = data_of(args, CMD_RECALL_DATA, data),
        .threads = (int32_t)settings->threads,
        .precision = settings_precision(settings),
    };
    char json[8192];

    if (require(args, CMD_RECALL_MODEL, "--model", err) != 0 ||
        require(args, CMD_RECALL_DATA, "--data", err) != 0)
        return CMD_USAGE;
    if (engine_bench_recall(&options, json, sizeof json, err) != 0)
        return CMD_FAILED;
    printf("%s\n", json);
    return CMD_DONE;
}

int cmd_bench_kl(const struct settings *settings, const struct setting_args *args, struct err *err)
{
    const char *data[ENGINE_BENCH_MAX_DATA];
    struct engine_bench_kl_options options = {
        .base = args->options[CMD_KL_BASE],
        .tuned = args->options[CMD_KL_TUNED],
        .delta = args->options[CMD_KL_DELTA],
        .other = args->options[CMD_KL_OTHER],
        .device = device_of(args, CMD_KL_DEVICE),
        .data = data,
        .data_count = data_of(args, CMD_KL_DATA, data),
        .threads = (int32_t)settings->threads,
        .precision = settings_precision(settings),
    };
    int32_t tokens;
    char json[8192];

    if (require(args, CMD_KL_BASE, "--base", err) != 0 ||
        require(args, CMD_KL_TUNED, "--tuned", err) != 0 ||
        require(args, CMD_KL_DATA, "--data", err) != 0 ||
        count_of(args, CMD_KL_TOKENS, "--tokens", 0, &tokens, err) != 0)
        return CMD_USAGE;
    options.max_tokens = tokens;
    if (options.delta != NULL && options.other != NULL) {
        err_set(err, ERR_INVALID, "--delta or --other, not both");
        return CMD_USAGE;
    }
    if (engine_bench_kl(&options, json, sizeof json, err) != 0)
        return CMD_FAILED;
    printf("%s\n", json);
    return CMD_DONE;
}

/* ------------------------------------------------------------------ apply */

int cmd_bench_apply(const struct settings *settings, const struct setting_args *args,
                    struct err *err)
{
    struct engine_bench_apply_options options = {
        .codec = args->options[CMD_APPLY_CODEC],
        .kernels = args->options[CMD_APPLY_KERNELS],
        .threads = (int32_t)settings->threads,
    };
    char json[2048];

    if (options.codec == NULL)
        options.codec = "graft";
    if (count_of(args, CMD_APPLY_ROWS, "--rows", 4096, &options.rows, err) != 0 ||
        count_of(args, CMD_APPLY_COLS, "--cols", 4096, &options.cols, err) != 0 ||
        ratio_of(args, CMD_APPLY_RATIO, &options.ratio, err) != 0)
        return CMD_USAGE;
    if (engine_bench_apply(&options, json, sizeof json, err) != 0)
        return CMD_FAILED;
    printf("%s\n", json);
    return CMD_DONE;
}
