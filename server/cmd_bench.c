#include <limits.h>
#include <stdio.h>
#include <stdlib.h>

#include "engine/engine.h"
#include "server/cmd.h"

static int count_of(const struct setting_args *args, int option, const char *flag, int32_t fallback,
                    int32_t *out, struct err *err)
{
    const char *text = args->options[option];
    char *end;
    long v;

    *out = fallback;
    if (text == NULL)
        return 0;
    v = strtol(text, &end, 10);
    if (end == text || *end != '\0' || v < 1 || v > 1 << 20)
        return err_set(err, ERR_INVALID, "%s: \"%s\" is not a count from 1 to 1048576", flag, text);
    *out = (int32_t)v;
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
        count_of(args, CMD_DECODE_TOKENS, "--tokens", 64, &options.tokens, err) != 0)
        return CMD_USAGE;
    if (engine_bench_decode(&options, json, sizeof json, err) != 0)
        return CMD_FAILED;
    printf("%s\n", json);
    return CMD_DONE;
}
