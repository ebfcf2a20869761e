#include "server/cmd.h"

#include <stdio.h>
#include <string.h>

#include "engine/base/json_text.h"
#include "engine/base/log.h"
#include "engine/engine.h"

#define NAMES(...) ((const char *const[]){__VA_ARGS__, NULL})
#define OPTIONS(...) ((const struct setting_option[]){__VA_ARGS__, {NULL, NULL, NULL}})
#define DATABASE "data", "database", "database_file", "log_level"

static cmd_fn cmd_version, cmd_help;

const struct cmd cmd_table[] = {
    {"serve",
     "--data DIR [--listen HOST:PORT] [--database URL] [--devices LIST]",
     "run the API and its workers",
     "Without --database a private PostgreSQL runs in the data directory. Stops on SIGTERM or\n"
     "SIGINT: requests and workers get the drain time, jobs go on at the next start.\n"
     "--devices auto means every CUDA device that can be used, else the cpu.",
     {.settings =
          NAMES("data", "listen", "database", "database_file", "devices", "infer_device",
                "precision", "workers", "watchdog", "tls_cert", "tls_key", "insecure", "log_level",
                "threads", "http_threads", "handlers", "connections", "max_body", "max_file",
                "header_deadline", "body_deadline", "drain", "lease", "heartbeat", "fence", "sweep",
                "poll", "recovery", "disk_patience", "collect", "grace", "max_attempts",
                "infer_sequences", "infer_queue", "infer_context", "base_memory", "delta_memory")},
     cmd_serve},
    {"work",
     "--role train --data DIR [--device cuda:0]",
     "run one worker; `serve` starts its own, a train-only node runs this",
     "A train worker takes jobs from the database. An infer worker answers over the socket that\n"
     "`graft serve` hands it, and is started by nobody else. --role probe prints a JSON line for\n"
     "each device of this machine. Exits with 75 when its device is lost and with 76 when it was\n"
     "silent for --watchdog seconds: start it again then.",
     {.settings =
          NAMES(DATABASE, "devices", "precision", "threads", "watchdog", "lease", "heartbeat",
                "fence", "poll", "recovery", "disk_patience", "grace", "max_attempts",
                "infer_sequences", "infer_queue", "infer_context", "base_memory", "delta_memory"),
      .options =
          OPTIONS({"--role", "train|infer|probe", "what the worker does"},
                  {"--device", "DEVICE", "cpu, cuda:N or shim:N; else the first of --devices"},
                  {"--lifeline-fd", "FD", "exit when this descriptor ends (set by serve)"},
                  {"--socket-fd", "FD", "socket to the server (set by serve)"},
                  {"--words-fd", "FD", "takes the reason of its death (set by serve)"})},
     cmd_work},
    {"migrate",
     "--data DIR | --database URL",
     "bring the database to this version's schema",
     NULL,
     {.settings = NAMES(DATABASE)},
     cmd_migrate},
    {"key create",
     "--data DIR --org O --project P",
     "make an API key and print it, once",
     "Organization and project are created when they are new. Works beside a running server and\n"
     "without one. Only the key's hash is kept.",
     {.settings = NAMES(DATABASE),
      .options = OPTIONS({"--org", "NAME", "organization"}, {"--project", "NAME", "project"})},
     cmd_key_create},
    {"key list",
     "--data DIR",
     "list the API keys that open something",
     "One line each: id, organization/project, last four characters, made, last used. Times are\n"
     "UTC. The id is what `key revoke` takes.",
     {.settings = NAMES(DATABASE)},
     cmd_key_list},
    {"key revoke",
     "--data DIR KEY_ID",
     "end an API key's life",
     NULL,
     {.settings = NAMES(DATABASE), .args_min = 1, .args_max = 1},
     cmd_key_revoke},
    {"model import",
     "PATH --name NAME --data DIR",
     "import a base model",
     "PATH is a Hugging Face directory (config.json, *.safetensors, tokenizer.json) or a .gguf\n"
     "file. All projects can then fine-tune NAME and chat with it. Works beside a running server\n"
     "and without one.",
     {.settings = NAMES(DATABASE),
      .options = OPTIONS({"--name", "NAME", "the model's id in the API"}),
      .args_min = 1,
      .args_max = 1},
     cmd_model_import},
    {"model list",
     "--data DIR",
     "list base models",
     NULL,
     {.settings = NAMES(DATABASE)},
     cmd_model_list},
    {"delta compress",
     "--base DIR --tuned DIR [--codec graft] [--ratio 16] [--calibration FILE] -o FILE",
     "compress the difference of a tuned model to its base",
     "DIR is a Hugging Face directory, a .gguf file or an imported base; the tuned one may be the\n"
     "directory of a LoRA adapter as peft saves it, which the codec lora keeps as it is and which\n"
     "every other codec compresses as base + product. FILE holds rows like those of a training\n"
     "file: graft and delta-come weigh by them what is lost, graft and bitdelta are distilled on\n"
     "them, and what comes of it is measured. Prints one JSON line.",
     {.settings = NAMES("threads", "precision"),
      .options =
          OPTIONS({"--base", "DIR", "the base"}, {"--tuned", "DIR", "the tuned model"},
                  {"-o", "FILE", "the delta"}, {"--codec", "NAME", "graft (default), bitdelta, …"},
                  {"--ratio", "R",
                   "16-bit bytes of the base to bytes of the delta (default: the codec's own)"},
                  {"--bytes", "N", "instead: bytes of the delta"},
                  {"--max-kl", "X", "instead: the smallest whose measured KL is not above X"},
                  {"--calibration", "FILE", "JSONL of examples that look like what will be asked"},
                  {"--held-out", "FILE", "JSONL of examples to measure on (default: those)"},
                  {"--distill-steps", "N", "of the scales (default: the codec's own number)"},
                  {"--seed", "N", "of the choice and order of rows (default 0)"},
                  {"--device", "NAME", "cpu (default)"},
                  {"--resume", NULL, "keep what an interrupted run needs, and go on from it"},
                  {"--no-recall", NULL, "do not ask the questions of the calibration rows"})},
     cmd_delta_compress},
    {"delta inspect",
     "FILE [--plot FILE.svg]",
     "say what a delta file holds, as JSON",
     "The plot shows what each matrix takes and what of its difference is lost.",
     {.settings = NULL,
      .options = OPTIONS({"--plot", "FILE.svg", "a picture of the same"}),
      .args_min = 1,
      .args_max = 1},
     cmd_delta_inspect},
    {"delta apply",
     "--base DIR --delta FILE -o DIR",
     "write base and delta as one model, a Hugging Face directory",
     "The base is a Hugging Face directory too; weights are written in F32.",
     {.settings = NULL,
      .options = OPTIONS({"--base", "DIR", "the base"}, {"--delta", "FILE", "the delta"},
                         {"-o", "DIR", "the new directory"})},
     cmd_delta_apply},
    {"collect",
     "--data DIR [--grace SECONDS]",
     "remove blobs that no row names and staging of dead attempts",
     "`serve` does this by itself every --collect seconds. A --grace shorter than an upload or a\n"
     "compression takes can cost a running server what it is about to name.",
     {.settings = NAMES(DATABASE, "grace")},
     cmd_collect},
    {"doctor",
     "--data DIR [--devices LIST] [--json]",
     "say what this machine has for Graft and what is missing",
     "A line for each finding: ok, warn or fail, and what to do. Exits with 1 where something "
     "must\n"
     "be mended. Takes the settings that `serve` would get; makes nothing.",
     {.settings = NAMES(DATABASE, "devices", "infer_device"),
      .options = OPTIONS({"--json", NULL, "for programs"})},
     cmd_doctor},
    {"bench train",
     "--model DIR [--seq 512] [--batch 2] [--steps 5] [--train-embeddings]",
     "time training steps; prints one JSON line",
     NULL,
     {.settings = NAMES("threads", "precision"),
      .options = OPTIONS({"--model", "PATH", "Hugging Face directory, GGUF or imported base"},
                         {"--device", "NAME", "cpu (default)"},
                         {"--seq", "N", "tokens of a row (default 512)"},
                         {"--batch", "N", "rows of a step (default 2)"},
                         {"--steps", "N", "steps to time, after one to warm up (default 5)"},
                         {"--train-embeddings", NULL, "train embeddings and head too"})},
     cmd_bench_train},
    {"bench decode",
     "--model DIR [--batch 1] [--tenants 0] [--prompt 64] [--tokens 64]",
     "time decoding; prints one JSON line",
     "Sequences read random prompts, then write a token each in every step. Tenants own random\n"
     "deltas of one bit per weight, or what --codec makes of random differences; their steps are\n"
     "made by the base alone as well, which says what tenants cost.",
     {.settings = NAMES("threads", "precision"),
      .options = OPTIONS({"--model", "PATH", "Hugging Face directory, GGUF or imported base"},
                         {"--device", "NAME", "cpu (default)"},
                         {"--batch", "N", "sequences at once (default 1)"},
                         {"--tenants", "N", "deltas among them, at most one each (default 0)"},
                         {"--prompt", "N", "tokens of each prompt (default 64)"},
                         {"--tokens", "N", "tokens that each sequence writes (default 64)"},
                         {"--codec", "NAME", "of the tenants' deltas"},
                         {"--ratio", "R", "16-bit bytes of a matrix to its delta's"})},
     cmd_bench_decode},
    {"bench apply",
     "--rows N --cols N [--codec graft] [--ratio 16]",
     "time one row through a delta; prints one JSON line",
     "A random difference is compressed, then applied in turn with an F32 matrix of its shape, on\n"
     "the CPU; more of both than the caches hold.",
     {.settings = NAMES("threads"),
      .options = OPTIONS({"--rows", "N", "outputs of the matrix (default 4096)"},
                         {"--cols", "N", "inputs of the matrix (default 4096)"},
                         {"--codec", "NAME", "graft (default), bitdelta, …"},
                         {"--ratio", "R", "16-bit bytes of the matrix to its delta's"},
                         {"--kernels", "NAME", "avx512, avx2 or plain (default: the best)"})},
     cmd_bench_apply},
    {"bench recall",
     "--model DIR [--delta FILE] --data FILE [FILE ...]",
     "ask a file's questions; prints one JSON line",
     "Of each file: the share of answers that are exact and that contain the expected one (at\n"
     "most 512 questions are asked, evenly spread), and the loss over all answers.",
     {.settings = NAMES("threads", "precision"),
      .options = OPTIONS({"--model", "PATH", "Hugging Face directory, GGUF or imported base"},
                         {"--delta", "FILE", "a delta on it (default: the model alone)"},
                         {"--data", "FILE", "JSONL of chat examples; more may follow"},
                         {"--device", "NAME", "cpu (default)"}),
      .args_max = ENGINE_BENCH_MAX_DATA - 1},
     cmd_bench_recall},
    {"bench kl",
     "--base DIR --tuned DIR [--delta FILE | --other DIR] --data FILE [FILE ...]",
     "how far a delta is from the tuned model; prints one JSON line",
     "Of each file: the mean KL(tuned || other) in nats a token, over all tokens and over those "
     "of\n"
     "answers. The other is the base with a delta, or a second model, or the base alone.",
     {.settings = NAMES("threads", "precision"),
      .options = OPTIONS({"--base", "PATH", "Hugging Face directory, GGUF or imported base"},
                         {"--tuned", "PATH", "the tuned model"},
                         {"--delta", "FILE", "a delta on the base"},
                         {"--other", "PATH", "instead: a model of the same shapes"},
                         {"--data", "FILE", "JSONL of chat examples; more may follow"},
                         {"--tokens", "N", "of each file at most, evenly spread (default: all)"},
                         {"--device", "NAME", "cpu (default)"}),
      .args_max = ENGINE_BENCH_MAX_DATA - 1},
     cmd_bench_kl},
    {"version", "", "print the version", NULL, {.settings = NULL}, cmd_version},
    {"help", "[COMMAND]", "explain a command", NULL, {.args_max = 2}, cmd_help},
};
const size_t cmd_count = sizeof cmd_table / sizeof cmd_table[0];

/* ------------------------------------------------------------------ help */

static void print_list(FILE *out)
{
    fprintf(out, "usage: graft COMMAND [OPTIONS]\n\n");
    for (size_t i = 0; i < cmd_count; i++)
        fprintf(out, "  %-14s %s\n", cmd_table[i].name, cmd_table[i].summary);
    fprintf(out, "\n`graft help COMMAND` says more.\n");
}

static void print_command(FILE *out, const struct cmd *cmd)
{
    fprintf(out, "usage: graft %s %s\n\n%s.\n", cmd->name, cmd->arguments, cmd->summary);
    if (cmd->text != NULL)
        fprintf(out, "%s\n", cmd->text);
    if (cmd->spec.settings != NULL || cmd->spec.options != NULL)
        fprintf(out, "\n");
    settings_print_help(out, &cmd->spec);
}

/* The command that `first` (and `second`, for names of two words) name; *words is how many of them
 * were used. */
static const struct cmd *find(const char *first, const char *second, int *words)
{
    for (size_t i = 0; i < cmd_count; i++) {
        const char *name = cmd_table[i].name;
        size_t n = strlen(first);

        if (strcmp(name, first) == 0) {
            *words = 1;
            return &cmd_table[i];
        }
        if (second != NULL && strncmp(name, first, n) == 0 && name[n] == ' ' &&
            strcmp(name + n + 1, second) == 0) {
            *words = 2;
            return &cmd_table[i];
        }
    }
    return NULL;
}

/* "key" alone names a family. */
static bool print_family(FILE *out, const char *first)
{
    size_t n = strlen(first);
    bool found = false;

    for (size_t i = 0; i < cmd_count; i++) {
        const struct cmd *c = &cmd_table[i];

        if (strncmp(c->name, first, n) == 0 && c->name[n] == ' ') {
            fprintf(out, "%susage: graft %s %s\n       %s\n", found ? "\n" : "", c->name,
                    c->arguments, c->summary);
            found = true;
        }
    }
    return found;
}

static int cmd_help(const struct settings *settings, const struct setting_args *args,
                    struct err *err)
{
    const char *first = args->arg_count > 0 ? args->args[0] : NULL;
    const char *second = args->arg_count > 1 ? args->args[1] : NULL;
    const struct cmd *cmd;
    int words;

    if (first == NULL) {
        print_list(stdout);
        return CMD_DONE;
    }
    cmd = find(first, second, &words);
    if (cmd != NULL && words == args->arg_count) {
        print_command(stdout, cmd);
        return CMD_DONE;
    }
    if (second == NULL && print_family(stdout, first))
        return CMD_DONE;
    err_set(err, ERR_INVALID, "there is no command \"%s%s%s\"", first, second != NULL ? " " : "",
            second != NULL ? second : "");
    return CMD_USAGE;
}

static int cmd_version(const struct settings *settings, const struct setting_args *args,
                       struct err *err)
{
    printf("graft %s\n", GRAFT_VERSION);
    return CMD_DONE;
}

/* ------------------------------------------------------------------ dispatch */

static bool wants_help(int argc, char **argv)
{
    for (int i = 0; i < argc; i++) {
        if (strcmp(argv[i], "--") == 0)
            return false;
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0)
            return true;
    }
    return false;
}

enum log_level cmd_log_level(const struct settings *settings)
{
    const char *name = settings->log_level;

    return strcmp(name, "debug") == 0   ? LOG_LEVEL_DEBUG
           : strcmp(name, "warn") == 0  ? LOG_LEVEL_WARN
           : strcmp(name, "error") == 0 ? LOG_LEVEL_ERROR
                                        : LOG_LEVEL_INFO;
}

static int run(const struct cmd *cmd, int argc, char **argv)
{
    struct settings settings;
    struct setting_args args;
    struct err err = {0};
    int code;

    if (settings_load(&settings, &args, &cmd->spec, argc, argv, &err) != 0) {
        fprintf(stderr, "graft: %s\nsee: graft help %s\n", err.message, cmd->name);
        return CMD_USAGE;
    }
    log_setup(cmd->name, cmd_log_level(&settings));
    json_text_setup();
    code = cmd->run(&settings, &args, &err);
    if (err_is_set(&err))
        fprintf(stderr, "graft: %s\n", err.message);
    if (code == CMD_USAGE)
        fprintf(stderr, "see: graft help %s\n", cmd->name);
    settings_release(&settings);
    if (fflush(stdout) != 0 && code == CMD_DONE) {
        fprintf(stderr, "graft: standard output could not be written\n");
        return CMD_FAILED;
    }
    return code;
}

int cmd_main(int argc, char **argv)
{
    const struct cmd *cmd;
    int words;

    if (argc < 2) {
        print_list(stderr);
        return CMD_USAGE;
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0) {
        print_list(stdout);
        return CMD_DONE;
    }
    if (strcmp(argv[1], "--version") == 0)
        argv[1] += 2;
    cmd = find(argv[1], argc > 2 ? argv[2] : NULL, &words);
    if (cmd == NULL && argc > 2 && wants_help(argc - 2, argv + 2) && print_family(stdout, argv[1]))
        return CMD_DONE;
    if (cmd == NULL) {
        if (!print_family(stderr, argv[1]))
            fprintf(stderr, "graft: there is no command \"%s\"\nsee: graft help\n", argv[1]);
        return CMD_USAGE;
    }
    if (wants_help(argc - 1 - words, argv + 1 + words)) {
        print_command(stdout, cmd);
        return CMD_DONE;
    }
    return run(cmd, argc - 1 - words, argv + 1 + words);
}
