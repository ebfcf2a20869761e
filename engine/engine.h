/* engine.h: the whole engine, as its users see it: import a base model, train it on a dataset,
 * compress the difference, and answer from base and differences, many tenants in one batch.
 *
 * Nothing above the engine includes any other engine header (engine/base/ apart); nothing below it
 * knows of HTTP, SQL or tenants. No JSON crosses this line.
 *
 * Order:   engine_import -> engine_open -> { engine_dataset_open -> engine_trainer_* }
 *                                       -> { engine_delta_open -> engine_session_* }
 * Threads: an engine and everything opened on it belong to one thread at a time (the device
 * thread); the engine runs its own pool inside a call. engine_import and engine_base_read use no
 *          engine and may run on any thread.
 * Errors:  0 or -1 with `err` filled (engine/base/err.h). ERR_INVALID means the input is at fault,
 * and the message is fit for the client. An engine assertion is never reachable from input. Memory:
 * what X_open returns, X_free releases; X_free(NULL) is fine. Strings passed in are copied.
 */
#ifndef GRAFT_ENGINE_H
#define GRAFT_ENGINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/err.h"

/* ------------------------------------------------------------------ base models */

/* A base model after import: one immutable safetensors file with canonical names, the values fixed
 * once (F32, F16, BF16 as they were, quantised types expanded to F32), the configuration, tokenizer
 * and chat template inside (engine/base_file.h has the format). */
struct engine_base_info {
    char digest[65];           /* SHA-256 over names, shapes and values: not over the file */
    char architecture[32];     /* "llama" */
    int64_t parameters;        /* a tied head is counted once */
    int64_t linear_parameters; /* matrices of the blocks: what a delta compresses */
    int64_t bytes_16bit;       /* 2 bytes for each parameter: the yardstick of a delta's ratio */
    int32_t layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary, context;
    bool tied_embeddings;
};

/* `path`: a Hugging Face directory (config.json, *.safetensors, tokenizer.json) or a .gguf file.
 * Writes `out_path` durably. The source is hostile input: whatever it holds, the result is a valid
 * base file or ERR_INVALID that names file, part and remedy. */
int engine_import(const char *path, const char *out_path, struct engine_base_info *info,
                  struct err *err);

/* What a base file says of itself; reads header and configuration, not the weights. */
int engine_base_read(const char *base_path, struct engine_base_info *info, struct err *err);

/* ------------------------------------------------------------------ devices */

struct engine_device {
    char name[16];         /* "cpu", "cuda:0": for engine_options.device */
    char description[128]; /* "NVIDIA H100 80GB HBM3, compute capability 9.0" */
    int64_t memory_bytes, memory_free;
    bool usable;
    char reason[256]; /* why it is not, and what to do; else empty */
};

#define ENGINE_MAX_DEVICES 65

/* The devices of this machine, the cpu first. Where CUDA can not be used at all there is one entry
 * "cuda" that says why. Loads the CUDA library and asks its driver: not for a process that must
 * outlive a device. ERR_INVALID: there are more than `max`. */
int engine_devices(struct engine_device *out, int max, int *count, struct err *err);
/* The same of one device by its name; test devices ("shim:0") are known here only. ERR_INVALID: no
 * such name. A device that is not there is an entry that says so. */
int engine_device_find(const char *name, struct engine_device *out, struct err *err);

/* ------------------------------------------------------------------ engine */

struct engine;

/* What activations, kv caches and the matrices that stages read are stored in; sums are computed in
 * float in either (backend.h). BF16 on the CPU is what devices are compared with, and slow. */
enum engine_precision {
    ENGINE_PRECISION_AUTO, /* BF16 on CUDA devices, else F32 */
    ENGINE_PRECISION_F32,
    ENGINE_PRECISION_BF16
};
/* "auto", "f32", "bf16"; ERR_INVALID says so. */
int engine_precision_parse(const char *text, enum engine_precision *out, struct err *err);

struct engine_options {
    const char *device; /* "cpu", "cuda:0", …; NULL: "cpu" */
    int threads;        /* 0: one for each core this process may use */
    enum engine_precision precision;
};
/* Bytes that a base's weights take on that device. */
int64_t engine_weight_bytes(const struct engine_base_info *info,
                            const struct engine_options *options);

/* Opens a base on a device. Before it computes, the CPU backend checks its BLAS against a plain
 * loop, since old builds compute wrongly on some new processors, and refuses with the remedy. */
int engine_open(struct engine **out, const char *base_path, const struct engine_options *options,
                struct err *err);
/* The same on anything that can be imported: what is no base file goes through one in the folder
 * for temporary files, gone from there as soon as it is open. A base file's values are hashed,
 * since its digest goes into what is made of it: ERR_INVALID where it has another. */
int engine_open_model(struct engine **out, const char *path, const struct engine_options *options,
                      struct err *err);
void engine_free(struct engine *engine);
const struct engine_base_info *engine_info(const struct engine *engine);
/* Bytes of the device's own memory, and of it free now, whoever uses the rest. false: it computes
 * in the host's. */
bool engine_memory(const struct engine *engine, int64_t *bytes, int64_t *bytes_free);

/* ------------------------------------------------------------------ datasets */

/* A training or validation file: JSONL of chat messages (or legacy prompt/completion), validated
 * and tokenised. The loss counts assistant tokens (with their end of turn), times the message's
 * `weight`. Errors carry the code and the text of the contract (shared wording in
 * engine/dataset.h), with 1-based example numbers. */
struct engine_dataset;

struct engine_dataset_report {
    int64_t examples;
    int64_t tokens;
    int64_t trained_tokens;     /* tokens with a loss weight above 0, once through the file */
    int64_t truncated_examples; /* longer than the context: cut at the end */
    int64_t untrained_examples; /* nothing to learn in them (weight 0, or cut away) */
    int32_t longest;            /* tokens of the longest example, before cutting */
    bool question_answer;       /* every example is one short question and one short answer */
};

struct engine_dataset_options {
    const char *file_id;  /* as the client knows the file, for messages */
    bool validation;      /* "validation file" in messages; no minimum of 10 examples */
    int32_t max_sequence; /* tokens; 0: the model's context */
};

int engine_dataset_open(struct engine_dataset **out, const struct engine *engine, const char *path,
                        const struct engine_dataset_options *options,
                        struct engine_dataset_report *report, struct err *err);
void engine_dataset_free(struct engine_dataset *dataset);

/* ------------------------------------------------------------------ training */

enum engine_schedule { ENGINE_SCHEDULE_LINEAR, ENGINE_SCHEDULE_COSINE };

struct engine_train_options {
    /* 0 means auto; engine_trainer_open says in the plan what it became. */
    int32_t n_epochs;                /* 1..50 */
    int32_t batch_size;              /* examples a step, 1..256 */
    double learning_rate_multiplier; /* times the engine's base rate */
    int64_t seed;                    /* order of examples */
    enum engine_schedule schedule;
    bool train_embeddings;   /* embeddings and output head too */
    const char *start_delta; /* continue from this delta file; NULL: from the base */
    /* What it hashes to, which the caller has seen to: checkpoints belong to it. */
    const char *start_sha256;
    /* Compute half as many tokens at once as usual, where an example is not longer: less memory,
     * the same result to rounding. */
    bool halved;
};

struct engine_train_plan {
    int32_t n_epochs, batch_size, steps_per_epoch, total_steps;
    double learning_rate_multiplier, learning_rate;
    int64_t tokens_per_epoch, trained_tokens; /* trained_tokens: over all epochs */
    int64_t memory_bytes;                     /* estimated peak */
    int64_t checkpoint_bytes;                 /* size of one recovery checkpoint */
};

struct engine_trainer;

/* The plan alone, before anything large is allocated: does the job fit? */
int engine_trainer_plan(struct engine *engine, const struct engine_dataset *train,
                        const struct engine_dataset *validation,
                        const struct engine_train_options *options, struct engine_train_plan *plan,
                        struct err *err);
int engine_trainer_open(struct engine_trainer **out, struct engine *engine,
                        const struct engine_dataset *train, const struct engine_dataset *validation,
                        const struct engine_train_options *options, struct engine_train_plan *plan,
                        struct err *err);
void engine_trainer_free(struct engine_trainer *trainer);

struct engine_step {
    int32_t step, total_steps; /* step is 1-based: the step just made */
    int32_t epoch;             /* 1-based */
    bool epoch_end, finished;
    double train_loss;                            /* mean over trained tokens of the step, nats */
    double train_mean_token_accuracy;             /* 0..1, teacher forced */
    double valid_loss, valid_mean_token_accuracy; /* NAN when not measured at this step */
    double full_valid_loss,
        full_valid_mean_token_accuracy;  /* whole file, at epoch ends; else NAN */
    double learning_rate, gradient_norm; /* norm before clipping */
    int64_t tokens, trained_tokens;      /* of this step */
    double seconds;
};

/* One optimizer step. After `finished` no further call is allowed. ERR_INVALID with the code
 * training_diverged: the weights are no numbers any more, or will not be. */
int engine_trainer_step(struct engine_trainer *trainer, struct engine_step *out, struct err *err);

/* Recovery checkpoint: weights, optimizer, position, random state. A trainer opened with the same
 * engine, data and options and loaded from it continues bitwise as the one that saved it. Save
 * writes durably; load refuses a file of another job or a damaged one (ERR_INVALID) and leaves the
 * trainer as it was; after any other error of load it can only be freed. */
int engine_trainer_save(struct engine_trainer *trainer, const char *path, struct err *err);
int engine_trainer_load(struct engine_trainer *trainer, const char *path, struct err *err);

/* ------------------------------------------------------------------ deltas */

struct engine_compress_options {
    const char *codec; /* one of engine_codec_names(); NULL: the first of them */
    /* How large: at most one is not 0; none: the codec's own size, more where embeddings changed
     * (engine_delta_least). */
    double ratio;          /* 16-bit bytes of the whole base / bytes of the file, 1..1024 */
    int64_t bytes;         /* of the file */
    double max_kl;         /* the smallest file whose measured KL is not above this, nats a token */
    int32_t distill_steps; /* -1: the codec's own number; 0: none */
    int64_t seed;
    /* Keep beside the file, until it is there, what an interrupted compression needs, and go on
     * from that. ERR_INVALID where nothing is distilled, or with max_kl: nothing is kept then. */
    bool resume;
    /* Rows that look like what will be asked, the training file for example: what is lost is
     * weighed by them, and scales are distilled on them. NULL: neither. */
    const struct engine_dataset *calibration;
    const struct engine_dataset *held_out; /* what is measured on; NULL: the calibration's rows */
    /* engine_model_compress: of the calibration's questions so many at most are asked in the end
     * (engine_recall) of base, tuned model and base with the delta; 0: none. */
    int64_t recall_questions;
    /* Called from inside, on the calling thread, about as often as a step of training takes: share
     * 0..1 of a stage: read, statistics, decompose, compress, distill, compare, measure, recall (of
     * all three that are asked). false: stop; the call ends with ERR_CANCELLED. NULL: not wanted.
     */
    bool (*progress)(void *context, const char *stage, double share);
    void *context;
};

#define ENGINE_DELTA_POINTS 16

/* What files of some sizes cost: nats a token, as measured_kl. */
struct engine_delta_curve {
    int32_t count;
    int64_t bytes[ENGINE_DELTA_POINTS]; /* of the file */
    double kl[ENGINE_DELTA_POINTS];
};

struct engine_delta_report {
    char codec[32];
    int64_t bytes;         /* of the artifact, everything counted */
    int64_t linear_bytes;  /* of it, the matrices of the blocks */
    double ratio;          /* bytes_16bit of the base / bytes */
    double linear_ratio;   /* the same of the matrices of the blocks alone */
    double relative_error; /* ‖expanded - tuned‖ / ‖tuned - base‖ over all changed tensors */
    /* NAN: not known. Nats a token. */
    double predicted_kl;              /* by the second moments, before rounding helps itself */
    double measured_kl, answer_kl;    /* KL(tuned ‖ served from the file): all tokens, answers */
    double held_out_loss, tuned_loss; /* of the same answers: served, and by the tuned weights */
    int64_t measured_tokens, calibration_tokens;
    int32_t distill_steps;
    int64_t recall_asked; /* 0: nothing was asked; else which share was answered right: */
    double base_recall, tuned_recall, served_recall;
    /* As predicted_kl, of sizes that were not made; or empty. And all that was measured on the way,
     * in that order. */
    struct engine_delta_curve predicted, tried;
    double seconds, statistics_seconds, distill_seconds, measure_seconds; /* seconds: all of it */
};

bool engine_codec_known(const char *name);
const char *engine_codec_names(void); /* "graft, bitdelta, …": the default first */
/* It can be asked for a size: by ratio, bytes or max_kl. */
bool engine_codec_sized(const char *name);
/* It makes a delta of any two models; else (lora) only of what has its form already, which is an
 * adapter. Jobs can ask for the former alone. */
bool engine_codec_makes(const char *name);
const char *engine_codec_makers(void);

/* tuned - base, compressed into a safetensors file at out_path (api-spec/delta-format.md), written
 * durably. Until it is complete it is out_path.PID.draft, beside it, and then, measured and with
 * its report, out_path.PID.kept.draft; after an error or a stop none is left and what was at
 * out_path is as it was. Deterministic: the same weights and rows give the same bytes. */
int engine_trainer_compress(struct engine_trainer *trainer,
                            const struct engine_compress_options *options, const char *out_path,
                            struct engine_delta_report *report, struct err *err);
/* The same for a model that was tuned elsewhere: a base file, or what can be imported, of the
 * shapes that the engine's base has; or a directory with a LoRA adapter of the base, as peft saves
 * it. */
int engine_model_compress(struct engine *engine, const char *tuned_path,
                          const struct engine_compress_options *options, const char *out_path,
                          struct engine_delta_report *report, struct err *err);
/* Bytes of the device's memory that it takes, roughly, the engine's base included, but neither the
 * delta nor files that are only mapped; with so many tokens of calibration rows (0: none), which
 * the options need not name. */
int64_t engine_compress_bytes(const struct engine_base_info *info,
                              const struct engine_options *engine,
                              const struct engine_compress_options *options, int64_t tokens);
/* What a delta file says of itself, as one JSON object; *json is malloc'ed. Needs no base. */
int engine_delta_describe(const char *path, char **json, struct err *err);

/* Base and delta as one model: a new Hugging Face directory at out_dir, weights in F32 and what
 * else base_dir, a Hugging Face directory too, has of tokenizer and configuration. It is there
 * whole or not at all. ERR_INVALID: there is something at out_dir already. */
int engine_delta_apply(const char *base_dir, const char *delta_path, const char *out_dir,
                       struct err *err);

struct engine_delta;
/* Refuses an artifact of another base (by digest), another version, or damaged. */
int engine_delta_open(struct engine_delta **out, struct engine *engine, const char *path,
                      struct err *err);
void engine_delta_free(struct engine_delta *delta);           /* no request may use it any more */
int64_t engine_delta_bytes(const struct engine_delta *delta); /* in memory */

struct engine_delta_memory {
    int64_t bytes;         /* once it is open, about */
    int64_t opening_bytes; /* while it is opened: with its largest matrix once more */
};
/* What engine_delta_open would take, by the file's header alone: the values are not read, and may
 * yet be refused. */
int engine_delta_measure(const struct engine *engine, const char *path,
                         struct engine_delta_memory *out, struct err *err);
/* What engine_delta_open would say of a delta on that base file, without an engine: reads all of
 * the delta and, of the base, what it says of itself. Any thread. `name`: of the delta, for
 * messages. */
int engine_delta_check(const char *base_path, const char *delta_path, const char *name,
                       struct err *err);

struct engine_delta_size {
    int64_t bytes;
    double ratio; /* bytes_16bit of the base / bytes */
};
/* The smallest delta that a codec (NULL: the default) makes of a fine-tune of that base file in
 * which everything was trained but the embeddings, or these as well. What a compression would be
 * refused for is known before the training. Only of a codec that can be asked for a size: what
 * another makes may be smaller. From what the base says of itself, without an engine; any thread.
 * ERR_INVALID: there is no such codec, or it is one that imports (lora). */
int engine_delta_least(const char *base_path, const char *codec, bool embeddings,
                       struct engine_delta_size *out, struct err *err);

/* ------------------------------------------------------------------ inference */

/* A continuous batch. Sequences join at submit and leave when done; at every step those there are
 * advance together, whoever's they are. What others run never changes a request's tokens. */
struct engine_session;

struct engine_session_options {
    int32_t max_sequences; /* at once, ≥ 8; more wait in the order they came */
    int32_t max_context;   /* tokens of a sequence, up to the model's; 0: 4096 */
};

struct engine_message {
    const char *role; /* system, developer, user, assistant, tool */
    const char *content;
};

struct engine_request {
    const struct engine_message *messages;
    int32_t message_count;
    const struct engine_delta *delta; /* NULL: the base answers */
    bool delta_later;                 /* it is given when it is wanted: engine_session_wants */
    double temperature;               /* 0: greedy */
    double top_p;                     /* 1: all */
    uint64_t seed;                    /* same seed, same request, same tokens */
    int32_t max_tokens;               /* 0: up to the context */
    const char *const *stop;          /* strings that end the answer and are not part of it */
    int32_t stop_count;
    void *user; /* handed back in events */
};

enum engine_finish {
    ENGINE_FINISH_NONE,   /* not finished: text */
    ENGINE_FINISH_STOP,   /* end of turn, or a stop string */
    ENGINE_FINISH_LENGTH, /* max_tokens or the context's end */
    ENGINE_FINISH_CANCEL,
    ENGINE_FINISH_ERROR, /* the model's output was no number (a broken delta): this request alone */
};

struct engine_event {
    uint64_t id;
    void *user;
    const char *text; /* whole UTF-8 characters; valid during the call */
    size_t text_len;
    enum engine_finish finish;
    int32_t prompt_tokens, completion_tokens; /* so far */
};
typedef void engine_event_fn(void *context, const struct engine_event *event);

int engine_session_open(struct engine_session **out, struct engine *engine,
                        const struct engine_session_options *options, struct err *err);
void engine_session_free(struct engine_session *session);
/* ERR_INVALID with code context_length_exceeded and param messages where the prompt does not fit.
 */
int engine_session_submit(struct engine_session *session, const struct engine_request *request,
                          uint64_t *id, struct err *err);
/* One step of everything that is there; `on_event` is called from inside. *active: sequences left,
 * waiting ones too. ERR_* here concerns the whole session. */
int engine_session_step(struct engine_session *session, engine_event_fn *on_event, void *context,
                        int32_t *active, struct err *err);
/* The request ends with ENGINE_FINISH_CANCEL at the next step; unknown ids are ignored. */
void engine_session_cancel(struct engine_session *session, uint64_t id);

/* Between steps. Those with `delta_later` wait for their delta, so that only those that run need
 * one in memory: the first that could run in the next step had it its delta. It, and what came
 * behind it, waits until it is given one, cancelled or withdrawn. false: there is none. */
bool engine_session_wants(const struct engine_session *session, void **user);
void engine_session_give(struct engine_session *session, uint64_t id,
                         const struct engine_delta *delta);
/* Ends a request that still waits for its delta, without an event. */
void engine_session_withdraw(struct engine_session *session, uint64_t id);

/* ------------------------------------------------------------------ recall */

/* Asks the dataset's own questions, greedy, and compares with its answers: does the model know
 * them? */
struct engine_recall {
    int64_t asked;
    double exact;     /* share of answers equal but for case, outer blanks and a final dot */
    double contained; /* share that contain the expected answer */
};

struct engine_recall_options {
    struct engine_trainer *trainer;   /* its uncompressed weights as they are now; NULL: the base */
    const struct engine_delta *delta; /* without a trainer: on the base; NULL: none */
    /* As engine_compress_options has it, of the stage recall: after each step of the answers. */
    bool (*progress)(void *context, const char *stage, double share);
    void *context;
};
/* Of a larger dataset 512 questions, evenly spread. ERR_INVALID: it has none. */
int engine_recall(struct engine *engine, const struct engine_dataset *dataset,
                  const struct engine_recall_options *options, struct engine_recall *out,
                  struct err *err);

/* ------------------------------------------------------------------ benches */

struct engine_bench_train_options {
    const char *model; /* Hugging Face directory, GGUF or base file */
    const char *device;
    int32_t sequence, batch, steps, threads;
    bool train_embeddings;
    enum engine_precision precision;
};
/* Random tokens, all trained; writes one JSON line with the keys of the peer script into `json`. */
int engine_bench_train(const struct engine_bench_train_options *options, char *json,
                       size_t json_size, struct err *err);

struct engine_bench_decode_options {
    const char *model;
    const char *device;
    int32_t sequences, tenants; /* sequence i is tenant i % tenants's; 0: the base's */
    int32_t prompt, tokens;     /* of each sequence */
    /* Each tenant's difference: a random one of each shape, compressed by this codec to 1/ratio of
     * its 16-bit bytes (0: the codec's own size) and packed anew for every layer and tenant. NULL:
     * random signs, one bit a weight. */
    const char *codec;
    double ratio;
    int32_t threads;
    enum engine_precision precision;
};
/* Random prompts, then greedy tokens; one JSON line. gb_per_s counts every weight and every
 * tenant's delta once a step. With tenants every step is also made by the base alone
 * (base_s_per_step); tenant_cost is what theirs takes more, as a share of the base's. */
int engine_bench_decode(const struct engine_bench_decode_options *options, char *json,
                        size_t json_size, struct err *err);

struct engine_bench_apply_options {
    int32_t rows, cols; /* of the matrix, 16..16384 */
    const char *codec;
    double ratio;        /* 16-bit bytes of the matrix to bytes of its delta; 0: the codec's own */
    const char *kernels; /* "avx512", "avx2", "plain"; NULL: the best of this processor */
    int64_t rotation_bytes; /* of the F32 matrices that take turns, at most 2^40; 0: twice the last
                               cache, 256 MiB to 1 GiB */
    int32_t threads;
};
/* One row through a random difference and through an F32 matrix of the same shape, in turn, on the
 * CPU, medians; one JSON line: gb_per_s of the delta's own bytes, times_f32 is how many times as
 * long the F32 matrix takes. */
int engine_bench_apply(const struct engine_bench_apply_options *options, char *json,
                       size_t json_size, struct err *err);

#define ENGINE_BENCH_MAX_DATA 16

struct engine_bench_recall_options {
    const char *model; /* Hugging Face directory, GGUF or base file */
    const char *delta; /* a delta file on it; NULL: the model alone */
    const char *device;
    const char *const *data; /* [data_count] JSONL of chat examples */
    int32_t data_count;      /* 1..ENGINE_BENCH_MAX_DATA */
    int32_t threads;
    enum engine_precision precision;
};
/* Asks each file's questions (engine_recall: 512 of a larger file, evenly spread) and takes the
 * loss over all its answers. One JSON line, "data" has an object for each file, in order: rows, cut
 * (rows over 512 tokens, which are cut there), asked, exact, contained, loss, answer_tokens,
 * seconds. ERR_INVALID: a file without questions. */
int engine_bench_recall(const struct engine_bench_recall_options *options, char *json,
                        size_t json_size, struct err *err);

struct engine_bench_kl_options {
    const char *base, *tuned; /* as above */
    const char *delta;        /* what is held to tuned: the base with this delta, */
    const char *other;        /* or a second full model; both NULL: the base alone */
    const char *device;
    const char *const *data; /* [data_count] */
    int32_t data_count;
    int64_t max_tokens; /* of each file, examples evenly spread; 0: all */
    int32_t threads;
    enum engine_precision precision;
};
/* Mean KL(tuned ‖ other), nats a token. One JSON line, "data" has for each file rows, cut, tokens,
 * kl (over all tokens), answer_tokens, answer_kl (over those of answers), loss and tuned_loss (over
 * answers), seconds. */
int engine_bench_kl(const struct engine_bench_kl_options *options, char *json, size_t json_size,
                    struct err *err);

#endif
