#include "engine/codec/peft.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base/file_io.h"
#include "engine/base/json_text.h"
#include "engine/codec/lora.h"
#include "engine/engine_parts.h"
#include "engine/safetensors.h"

#define CONFIG_FILE "adapter_config.json"
#define WEIGHTS_FILE "adapter_model.safetensors"
#define MAX_CONFIG ((size_t)1 << 20)
#define PREFIX "base_model.model."
#define MERGE "merge it into its base (merge_and_unload) and compress that model with another codec"

struct entry {
    struct tensor part[LORA_PARTS]; /* data owned; lora_A alone, until lora_B was found */
};

struct peft {
    struct entry *entry; /* [count] */
    int32_t count;
};

struct reading {
    struct peft *peft;
    const struct artifact_tensor *tensor;
    json_t *config;
    int64_t rank; /* of every pair; 0: each its own */
    double alpha;
    bool root; /* the scale is alpha / sqrt(rank) */
};

/* ------------------------------------------------------------------ configuration */

/* Is it there and says more than "no"? */
static bool is_set(const json_t *value)
{
    switch (value ? json_typeof(value) : JSON_NULL) {
    case JSON_NULL:
    case JSON_FALSE:
        return false;
    case JSON_OBJECT:
        return json_object_size(value) > 0;
    case JSON_ARRAY:
        return json_array_size(value) > 0;
    case JSON_STRING:
        return json_string_length(value) > 0;
    default:
        return true;
    }
}

static const struct {
    const char *key, *means;
} refused[] = {
    {"fan_in_fan_out", "it stores its matrices the other way round"},
    {"modules_to_save", "it has modules that were trained as a whole"},
    {"lora_bias", "its pairs have biases"},
    {"trainable_token_indices", "it changes embeddings"},
    {"layer_replication", "it repeats layers of its base"},
    {"target_parameters", "it adapts parameters that are not linear layers"},
    {"alora_invocation_tokens", "it is active only behind certain tokens"},
};

static int check_kind(const json_t *config, struct err *err)
{
    const char *type = json_string_value(json_object_get(config, "peft_type"));
    const char *bias = json_string_value(json_object_get(config, "bias"));

    if (!type || strcmp(type, "LORA") != 0)
        return err_set(err, ERR_INVALID,
                       "\"peft_type\" is %.32s: LORA is known; of another kind, " MERGE,
                       type ? type : "missing");
    if (bias && strcmp(bias, "none") != 0)
        return err_set(
            err, ERR_INVALID,
            "\"bias\" is %.32s: biases are no low-rank product; train with bias=\"none\", "
            "or " MERGE,
            bias);
    if (is_set(json_object_get(config, "bias")) && !bias)
        return err_set(err, ERR_INVALID, "\"bias\" is not a text: \"none\" is known");
    return 0;
}

/* Some beginnings change the base as well, so that the adapter is none of the base that is here. */
static int check_beginning(const json_t *config, struct err *err)
{
    static const char *const harmless[] = {"gaussian", "eva", "orthogonal"};
    const json_t *value = json_object_get(config, "init_lora_weights");
    const char *text = json_string_value(value);

    if (!value || json_is_null(value) || json_is_boolean(value))
        return 0;
    for (size_t i = 0; text && i < sizeof harmless / sizeof harmless[0]; i++)
        if (strcmp(text, harmless[i]) == 0)
            return 0;
    return err_set(
        err, ERR_INVALID,
        "\"init_lora_weights\" is %.32s: such a beginning changes the base too; save the "
        "adapter with path_initial_model_for_weight_conversion, or " MERGE,
        text ? text : "not a text");
}

/* What peft calls its variants of LoRA, those to come as well. */
static bool is_variant(const char *key)
{
    static const char suffix[] = "_config";
    static const char *const harmless[] = {"use_rslora", "eva_config", "megatron_config"};
    size_t len = strlen(key), tail = sizeof suffix - 1;

    for (size_t i = 0; i < sizeof harmless / sizeof harmless[0]; i++)
        if (strcmp(key, harmless[i]) == 0)
            return false;
    return strncmp(key, "use_", 4) == 0 || (len > tail && strcmp(key + len - tail, suffix) == 0);
}

static int check_uses(json_t *config, struct err *err)
{
    const char *key;
    json_t *value;

    for (size_t i = 0; i < sizeof refused / sizeof refused[0]; i++)
        if (is_set(json_object_get(config, refused[i].key)))
            return err_set(err, ERR_INVALID, "\"%s\" is set: %s; train without it, or " MERGE,
                           refused[i].key, refused[i].means);
    json_object_foreach(config, key, value)
    {
        if (is_set(value) && is_variant(key))
            return err_set(err, ERR_INVALID,
                           "\"%.48s\" is set: such an adapter is more than a low-rank product; "
                           "train without it, or " MERGE,
                           key);
    }
    return 0;
}

/* peft takes keys for regular expressions; names are what they mostly are. A ^ in front ties one to
 * the beginning of the module's name, else it may begin behind any dot. */
static bool is_plain(const char *key)
{
    key += key[0] == '^';
    return key[0] &&
           key[strspn(key, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.")] ==
               '\0';
}

static bool matches(const char *key, const char *module)
{
    size_t len = strlen(module), tail = strlen(key);

    if (key[0] == '^')
        return strcmp(key + 1, module) == 0;
    return len >= tail && strcmp(module + len - tail, key) == 0 &&
           (len == tail || module[len - tail - 1] == '.');
}

static int check_patterns(const json_t *config, struct err *err)
{
    static const char *const keys[] = {"rank_pattern", "alpha_pattern"};
    const char *name;
    json_t *value;

    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        json_t *pattern = json_object_get(config, keys[i]);

        if (!is_set(pattern))
            continue;
        if (!json_is_object(pattern))
            return err_set(err, ERR_INVALID, "\"%s\" is not an object", keys[i]);
        json_object_foreach(pattern, name, value)
        {
            if (!json_is_number(value) || !isfinite(json_number_value(value)))
                return err_set(err, ERR_INVALID, "\"%s\": \"%.64s\" is not a number", keys[i],
                               name);
            if (i == 1 && !is_plain(name))
                return err_set(err, ERR_INVALID,
                               "\"alpha_pattern\": \"%.64s\" is a regular expression: names of "
                               "modules are known; write them out, or " MERGE,
                               name);
        }
    }
    return 0;
}

static int read_numbers(struct reading *r, struct err *err)
{
    const json_t *rank = json_object_get(r->config, "r");
    const json_t *alpha = json_object_get(r->config, "lora_alpha");

    if (!json_is_integer(rank) || json_integer_value(rank) < 1 ||
        json_integer_value(rank) > LORA_MAX_RANK)
        return err_set(err, ERR_INVALID, "\"r\" is not a rank of 1 to %d", LORA_MAX_RANK);
    if (!json_is_number(alpha) || !isfinite(json_number_value(alpha)))
        return err_set(err, ERR_INVALID, "\"lora_alpha\" is not a number");
    /* Where ranks differ each pair has its own in its shape. */
    r->rank =
        is_set(json_object_get(r->config, "rank_pattern")) ? 0 : (int64_t)json_integer_value(rank);
    r->alpha = json_number_value(alpha);
    r->root = is_set(json_object_get(r->config, "use_rslora"));
    return 0;
}

static int read_config(struct reading *r, const struct peft_files *files, struct err *err)
{
    r->config = json_text_load(files->config, files->config_len, 0, err);
    if (!r->config)
        return err_prefix(err, CONFIG_FILE);
    if (!json_is_object(r->config))
        return err_set(err, ERR_INVALID, CONFIG_FILE ": it is not an object");
    if (check_kind(r->config, err) || check_uses(r->config, err) ||
        check_beginning(r->config, err) || check_patterns(r->config, err) || read_numbers(r, err))
        return err_prefix(err, CONFIG_FILE);
    return 0;
}

/* ------------------------------------------------------------------ weights */

static float scale_of(const struct reading *r, const char *module, int64_t rank)
{
    json_t *pattern = json_object_get(r->config, "alpha_pattern"), *value;
    double alpha = r->alpha;
    const char *key;

    json_object_foreach(pattern, key, value)
    {
        if (!matches(key, module))
            continue;
        alpha = json_number_value(value);
        break;
    }
    return (float)(alpha / (r->root ? sqrt((double)rank) : (double)rank));
}

/* The module and the part of "base_model.model.<module>.lora_A.weight"; -1: another name. */
static int split_name(const char *name, char module[SAFETENSORS_MAX_NAME + 1])
{
    static const char *const suffix[] = {
        [LORA_DOWN] = ".lora_A.weight", [LORA_UP] = ".lora_B.weight"};
    size_t len = strlen(name), prefix = strlen(PREFIX);

    for (int p = LORA_DOWN; p <= LORA_UP; p++) {
        size_t tail = strlen(suffix[p]);

        if (len <= prefix + tail || strncmp(name, PREFIX, prefix) != 0 ||
            strcmp(name + len - tail, suffix[p]) != 0)
            continue;
        snprintf(module, SAFETENSORS_MAX_NAME + 1, "%.*s", (int)(len - prefix - tail),
                 name + prefix);
        return p;
    }
    return -1;
}

/* The tensor of the base that a module has; NULL: none. */
static const struct artifact_tensor *find(const struct reading *r, const char *module)
{
    size_t len = strlen(module);

    for (int32_t i = 0; i < r->peft->count; i++) {
        const char *name = r->tensor[i].name;

        if (strncmp(name, module, len) == 0 && strcmp(name + len, ".weight") == 0)
            return &r->tensor[i];
    }
    return NULL;
}

static int check_half(const struct reading *r, const struct artifact_tensor *t, int p,
                      const struct tensor *half, struct err *err)
{
    int64_t side = p == LORA_DOWN ? t->cols : t->rows;
    int at = p == LORA_DOWN, of_rank = 1 - at;

    if (half->dtype > DTYPE_F16)
        return err_set(err, ERR_INVALID, "it has dtype %s; known: F32, F16, BF16",
                       dtype_name(half->dtype));
    if (half->rank != 2 || half->shape[at] != side)
        return err_set(err, ERR_INVALID,
                       "its shape does not fit a layer of [%d, %d]: the adapter was trained on "
                       "another base",
                       t->rows, t->cols);
    if (half->shape[of_rank] < 1 || half->shape[of_rank] > LORA_MAX_RANK)
        return err_set(err, ERR_INVALID, "it has rank %lld: 1 to %d are taken",
                       (long long)half->shape[of_rank], LORA_MAX_RANK);
    if (r->rank && half->shape[of_rank] != r->rank)
        return err_set(err, ERR_INVALID, "it has rank %lld, but \"r\" of " CONFIG_FILE " is %lld",
                       (long long)half->shape[of_rank],
                       (long long)json_integer_value(json_object_get(r->config, "r")));
    return 0;
}

static int copy(struct tensor *to, const struct tensor *from, struct err *err)
{
    size_t bytes = (size_t)tensor_elements(from) * (size_t)dtype_size(from->dtype);
    void *data = malloc(bytes);

    if (!data)
        return err_set(err, ERR_NO_MEMORY, "no memory for an adapter");
    memcpy(data, from->data, bytes);
    *to = tensor_view(data, from->dtype, from->rank, from->shape);
    return 0;
}

static int take(struct reading *r, const struct safetensors_tensor *from, struct err *err)
{
    char module[SAFETENSORS_MAX_NAME + 1];
    int p = split_name(from->name, module);
    const struct artifact_tensor *t = p < 0 ? NULL : find(r, module);

    if (p < 0)
        return err_set(err, ERR_INVALID,
                       "it is neither lora_A.weight nor lora_B.weight of a linear layer; train "
                       "without what it belongs to, or " MERGE);
    if (!t)
        return err_set(err, ERR_INVALID,
                       "the base has no layer \"%s\": the adapter is of another model", module);
    if (t->kind != ARTIFACT_MATRIX)
        return err_set(err, ERR_INVALID,
                       "\"%s\" is not a linear layer inside the blocks; leave it out of "
                       "target_modules, or " MERGE,
                       module);
    if (check_half(r, t, p, &from->view, err))
        return -1;
    return copy(&r->peft->entry[t - r->tensor].part[p], &from->view, err);
}

/* Both halves are there, of one rank; their scale. */
static int join(struct reading *r, int32_t index, struct err *err)
{
    const struct artifact_tensor *t = &r->tensor[index];
    struct tensor *part = r->peft->entry[index].part;
    int64_t one = 1;
    float *scale;
    char module[MODEL_NAME_MAX];

    if (!part[LORA_DOWN].data || !part[LORA_UP].data)
        return err_set(err, ERR_INVALID, "lora_%s.weight is missing: the file is damaged",
                       part[LORA_DOWN].data ? "B" : "A");
    scale = malloc(sizeof *scale);
    part[LORA_SCALE] = tensor_view(scale, DTYPE_F32, 1, &one);
    if (!scale)
        return err_set(err, ERR_NO_MEMORY, "no memory for an adapter");
    snprintf(module, sizeof module, "%.*s", (int)(strlen(t->name) - strlen(".weight")), t->name);
    *scale = scale_of(r, module, part[LORA_DOWN].shape[0]);
    return codec_lora.accept(part, t->rows, t->cols, err);
}

static int read_weights(struct reading *r, const struct safetensors *file, struct err *err)
{
    int32_t pairs = 0;

    for (int64_t i = 0; i < safetensors_count(file); i++)
        if (take(r, safetensors_at(file, i), err))
            return err_prefix(err, WEIGHTS_FILE ": \"%s\"", safetensors_at(file, i)->name);
    for (int32_t i = 0; i < r->peft->count; i++) {
        const struct tensor *part = r->peft->entry[i].part;

        if (!part[LORA_DOWN].data && !part[LORA_UP].data)
            continue;
        if (join(r, i, err))
            return err_prefix(err, WEIGHTS_FILE ": the pair of \"%s\"", r->tensor[i].name);
        pairs++;
    }
    return pairs ? 0 : err_set(err, ERR_INVALID, WEIGHTS_FILE ": it holds no pair of matrices");
}

/* ------------------------------------------------------------------ opening */

static int open_parsed(struct peft **out, const struct peft_files *files,
                       const struct safetensors *weights, const struct artifact_tensor *tensor,
                       int32_t count, struct err *err)
{
    struct reading r = {.peft = calloc(1, sizeof *r.peft), .tensor = tensor};
    int rc = -1;

    if (r.peft)
        r.peft->entry = calloc((size_t)count + 1, sizeof *r.peft->entry);
    if (!r.peft || !r.peft->entry) {
        err_set(err, ERR_NO_MEMORY, "no memory for an adapter");
        goto out;
    }
    r.peft->count = count;
    rc = read_config(&r, files, err) || read_weights(&r, weights, err) ? -1 : 0;
out:
    json_decref(r.config);
    if (rc == 0)
        *out = r.peft;
    else
        peft_free(r.peft);
    return rc;
}

int peft_open_memory(struct peft **out, const struct peft_files *files,
                     const struct artifact_tensor *tensor, int32_t count, struct err *err)
{
    struct safetensors *weights;
    int rc;

    *out = NULL;
    if (safetensors_open_memory(&weights, files->weights, files->weights_len, WEIGHTS_FILE, err))
        return -1;
    rc = open_parsed(out, files, weights, tensor, count, err);
    safetensors_free(weights);
    return rc;
}

bool peft_is_adapter(const char *dir)
{
    char path[ENGINE_PATH_MAX];

    return snprintf(path, sizeof path, "%s/" CONFIG_FILE, dir) < (int)sizeof path &&
           access(path, F_OK) == 0;
}

static int open_dir(struct peft **out, const char *dir, const struct artifact_tensor *tensor,
                    int32_t count, struct err *err)
{
    char config[ENGINE_PATH_MAX], weights[ENGINE_PATH_MAX], *text;
    struct peft_files files = {0};
    struct safetensors *file;
    int rc;

    if (snprintf(config, sizeof config, "%s/" CONFIG_FILE, dir) >= (int)sizeof config ||
        snprintf(weights, sizeof weights, "%s/" WEIGHTS_FILE, dir) >= (int)sizeof weights)
        return err_set(err, ERR_INVALID, "its path is too long");
    if (access(weights, F_OK) != 0)
        return err_set(err, ERR_INVALID,
                       "it has no " WEIGHTS_FILE ": save it with safe_serialization=True");
    if (file_read_all(config, MAX_CONFIG, &text, &files.config_len, err))
        return -1;
    files.config = text;
    rc = safetensors_open(&file, weights, err);
    if (!rc) {
        rc = open_parsed(out, &files, file, tensor, count, err);
        safetensors_free(file);
    }
    free(text);
    return rc;
}

int peft_open(struct peft **out, const char *dir, const struct artifact_tensor *tensor,
              int32_t count, struct err *err)
{
    *out = NULL;
    return open_dir(out, dir, tensor, count, err) ? err_prefix(err, "the adapter \"%s\"", dir) : 0;
}

void peft_free(struct peft *peft)
{
    if (!peft)
        return;
    for (int32_t i = 0; peft->entry && i < peft->count; i++)
        for (int p = 0; p < LORA_PARTS; p++)
            free(peft->entry[i].part[p].data);
    free(peft->entry);
    free(peft);
}

const struct tensor *peft_parts(const struct peft *peft, int32_t index)
{
    return peft->entry[index].part[LORA_SCALE].data ? peft->entry[index].part : NULL;
}
