#include "engine/pretokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/pretokenizer_pattern.h"
#include "engine/pretokenizer_unicode.h"

enum {
    MAX_STEPS = 16,
    MAX_PATTERN = 4096, /* bytes of a regex */
};

/* ByteLevel's own, GPT-2's. */
static const char byte_level_pattern[] =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

/* Cut the pieces at the matches of a pattern. */
struct step {
    pcre2_code *code;
    enum pretokenizer_unicode version;
    bool drop_matches, drop_others; /* "Removed", plain or inverted */
};

struct pretokenizer {
    struct step steps[MAX_STEPS];
    int step_count;
    bool adds_space;
    bool byte_level; /* seen; must be the last */
};

static int add_step(struct pretokenizer *pre, const char *pattern, uint32_t flags,
                    struct step **out, struct err *err)
{
    struct step *step = &pre->steps[pre->step_count];
    pcre2_compile_context *context;
    uint32_t can_be_empty = 0;
    PCRE2_UCHAR text[128];
    PCRE2_SIZE at = 0;
    int code = 0;

    if (pre->step_count == MAX_STEPS)
        return err_set(err, ERR_INVALID, "pre_tokenizer: more than %d steps", MAX_STEPS);
    context = pcre2_compile_context_create(NULL);
    if (context == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    pcre2_set_newline(context, PCRE2_NEWLINE_LF);
    step->code = pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED, PCRE2_UTF | flags, &code,
                               &at, context);
    pcre2_compile_context_free(context);
    if (step->code == NULL) {
        pcre2_get_error_message(code, text, sizeof text);
        return err_set(err, ERR_INVALID, "pre_tokenizer: pattern \"%.80s\": %s at byte %zu",
                       pattern, (char *)text, (size_t)at);
    }
    pre->step_count++;
    pcre2_pattern_info(step->code, PCRE2_INFO_MATCHEMPTY, &can_be_empty);
    if (can_be_empty)
        return err_set(err, ERR_INVALID,
                       "pre_tokenizer: pattern \"%.80s\" can match nothing, which is not supported",
                       pattern);
    /* Without JIT (not every machine allows it) the interpreter gives the same matches. */
    pcre2_jit_compile(step->code, PCRE2_JIT_COMPLETE);
    if (out != NULL)
        *out = step;
    return 0;
}

static bool flag(const json_t *spec, const char *key, bool fallback)
{
    const json_t *value = json_object_get(spec, key);

    return json_is_boolean(value) ? json_is_true(value) : fallback;
}

static int open_byte_level(struct pretokenizer *pre, const json_t *spec, struct err *err)
{
    pre->byte_level = true;
    if (flag(spec, "add_prefix_space", true)) {
        if (pre->step_count > 0)
            return err_set(err, ERR_INVALID,
                           "pre_tokenizer: add_prefix_space behind another step "
                           "is not supported");
        pre->adds_space = true;
    }
    if (!flag(spec, "use_regex", true))
        return 0;
    return add_step(pre, byte_level_pattern, PCRE2_UCP, NULL, err);
}

static int open_digits(struct pretokenizer *pre, const json_t *spec, struct err *err)
{
    struct step *step = NULL;
    const char *pattern = flag(spec, "individual_digits", false) ? "\\p{N}" : "\\p{N}+";

    if (add_step(pre, pattern, PCRE2_UCP, &step, err) != 0)
        return -1;
    step->version = PRETOKENIZER_UNICODE_DIGITS;
    return 0;
}

static int open_split(struct pretokenizer *pre, const json_t *spec, struct err *err)
{
    const json_t *pattern = json_object_get(spec, "pattern");
    const char *regex = json_string_value(json_object_get(pattern, "Regex"));
    const char *string = json_string_value(json_object_get(pattern, "String"));
    const char *behavior = json_string_value(json_object_get(spec, "behavior"));
    bool invert = flag(spec, "invert", false);
    struct step *step = NULL;

    if ((regex == NULL) == (string == NULL) || (string != NULL && string[0] == '\0'))
        return err_set(err, ERR_INVALID,
                       "pre_tokenizer: Split must have a \"pattern\" with a Regex or a String");
    if (strlen(regex != NULL ? regex : string) > MAX_PATTERN)
        return err_set(err, ERR_INVALID, "pre_tokenizer: a pattern has more than %d bytes",
                       MAX_PATTERN);
    if (behavior == NULL || (strcmp(behavior, "Isolated") != 0 && strcmp(behavior, "Removed") != 0))
        return err_set(err, ERR_INVALID,
                       "pre_tokenizer: Split with behavior \"%.32s\" is not supported yet; "
                       "supported: Isolated, Removed",
                       behavior != NULL ? behavior : "");
    if (regex != NULL && pretokenizer_pattern_check(regex, err) != 0)
        return -1;
    if (add_step(pre, regex != NULL ? regex : string, regex != NULL ? PCRE2_UCP : PCRE2_LITERAL,
                 &step, err) != 0)
        return -1;
    step->drop_matches = strcmp(behavior, "Removed") == 0 && !invert;
    step->drop_others = strcmp(behavior, "Removed") == 0 && invert;
    return 0;
}

static int open_one(struct pretokenizer *pre, const json_t *spec, struct err *err)
{
    const char *type = json_string_value(json_object_get(spec, "type"));

    if (type == NULL)
        return err_set(err, ERR_INVALID, "pre_tokenizer: \"type\" is missing");
    if (pre->byte_level)
        return err_set(err, ERR_INVALID, "pre_tokenizer: %.32s behind ByteLevel is not supported",
                       type);
    if (strcmp(type, "ByteLevel") == 0)
        return open_byte_level(pre, spec, err);
    if (strcmp(type, "Digits") == 0)
        return open_digits(pre, spec, err);
    if (strcmp(type, "Split") == 0)
        return open_split(pre, spec, err);
    return err_set(err, ERR_INVALID,
                   "pre_tokenizer: \"%.32s\" is not supported yet; supported: ByteLevel, Digits, "
                   "Split, and a Sequence of these",
                   type);
}

static int open_all(struct pretokenizer *pre, const json_t *spec, struct err *err)
{
    const char *type = json_string_value(json_object_get(spec, "type"));
    const json_t *list = json_object_get(spec, "pretokenizers");

    if (type == NULL || strcmp(type, "Sequence") != 0)
        return open_one(pre, spec, err);
    if (!json_is_array(list))
        return err_set(err, ERR_INVALID, "pre_tokenizer: \"pretokenizers\" must be an array");
    for (size_t i = 0; i < json_array_size(list); i++) {
        if (open_one(pre, json_array_get(list, i), err) != 0)
            return -1;
    }
    return 0;
}

int pretokenizer_open(struct pretokenizer **out, const json_t *spec, struct err *err)
{
    struct pretokenizer *pre = calloc(1, sizeof *pre);

    if (pre == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    if (open_all(pre, spec, err) != 0)
        goto fail;
    if (!pre->byte_level) {
        err_set(err, ERR_INVALID,
                "pre_tokenizer has no ByteLevel; only byte-level BPE is supported yet");
        goto fail;
    }
    *out = pre;
    return 0;
fail:
    pretokenizer_free(pre);
    return -1;
}

void pretokenizer_free(struct pretokenizer *pre)
{
    if (pre == NULL)
        return;
    for (int i = 0; i < pre->step_count; i++)
        pcre2_code_free(pre->steps[i].code);
    free(pre);
}

bool pretokenizer_adds_space(const struct pretokenizer *pre)
{
    return pre->adds_space;
}

static int add_piece(struct pretokenizer_pieces *pieces, size_t start, size_t end, struct err *err)
{
    if (start == end)
        return 0;
    if (pieces->count == pieces->capacity) {
        size_t capacity = pieces->capacity ? pieces->capacity * 2 : 64;
        struct pretokenizer_piece *grown =
            reallocarray(pieces->items, capacity, sizeof *pieces->items);

        if (grown == NULL)
            return err_set(err, ERR_NO_MEMORY, "out of memory");
        pieces->items = grown;
        pieces->capacity = capacity;
    }
    pieces->items[pieces->count++] =
        (struct pretokenizer_piece){.start = (uint32_t)start, .len = (uint32_t)(end - start)};
    return 0;
}

struct matcher {
    const struct step *step;
    pcre2_match_data *data;
    pcre2_match_context *context;
};

/* 1: found, in the match data; 0: no more; -1: error. */
static int next_match(const struct matcher *m, const char *piece, size_t len, size_t from,
                      struct err *err)
{
    int rc = pcre2_match(m->step->code, (PCRE2_SPTR)piece, len, from, PCRE2_NO_UTF_CHECK, m->data,
                         m->context);

    /* The JIT's stack is small; the interpreter takes memory as it needs. */
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT)
        rc = pcre2_match(m->step->code, (PCRE2_SPTR)piece, len, from,
                         PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, m->data, m->context);
    /* 0: a match with more groups than there is room for; its own bounds are there. */
    if (rc >= 0 || rc == PCRE2_ERROR_NOMATCH)
        return rc >= 0;
    if (rc == PCRE2_ERROR_NOMEMORY)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    return err_set(err, ERR_INVALID,
                   "the tokenizer's pattern needs too many steps on this text (error %d)", rc);
}

/* The pattern sees the piece alone: nothing before it and nothing behind it. */
static int split_piece(const struct matcher *m, const char *text, struct pretokenizer_piece piece,
                       struct pretokenizer_pieces *out, struct err *err)
{
    const size_t *bounds = pcre2_get_ovector_pointer(m->data);
    size_t at = 0;
    int found;

    while ((found = next_match(m, text + piece.start, piece.len, at, err)) > 0) {
        if (!m->step->drop_others &&
            add_piece(out, piece.start + at, piece.start + bounds[0], err) != 0)
            return -1;
        if (!m->step->drop_matches &&
            add_piece(out, piece.start + bounds[0], piece.start + bounds[1], err) != 0)
            return -1;
        at = bounds[1];
    }
    if (found < 0)
        return -1;
    return m->step->drop_others ? 0
                                : add_piece(out, piece.start + at, piece.start + piece.len, err);
}

static int run_step(const struct step *step, const char *text, size_t len,
                    const struct pretokenizer_pieces *in, struct pretokenizer_pieces *out,
                    struct err *err)
{
    struct matcher m = {.step = step};
    uint64_t limit =
        10000000 + 64 * (uint64_t)len; /* PCRE2's own default, and room for long runs */
    char *standing = NULL;
    int rc = 0;

    if (pretokenizer_stand_ins(text, len, step->version, &standing, err) != 0)
        return -1;
    m.data = pcre2_match_data_create(1, NULL);
    m.context = pcre2_match_context_create(NULL);
    if (m.data == NULL || m.context == NULL) {
        rc = err_set(err, ERR_NO_MEMORY, "out of memory");
        goto out;
    }
    pcre2_set_match_limit(m.context, limit > UINT32_MAX ? UINT32_MAX : (uint32_t)limit);
    out->count = 0;
    for (size_t i = 0; rc == 0 && i < in->count; i++)
        rc = split_piece(&m, standing != NULL ? standing : text, in->items[i], out, err);
out:
    pcre2_match_context_free(m.context);
    pcre2_match_data_free(m.data);
    free(standing);
    return rc;
}

int pretokenizer_split(const struct pretokenizer *pre, const char *text, size_t len,
                       struct pretokenizer_pieces *pieces, struct err *err)
{
    struct pretokenizer_pieces other = {0}, swap;
    int rc;

    pieces->count = 0;
    rc = add_piece(pieces, 0, len, err);
    for (int i = 0; rc == 0 && i < pre->step_count; i++) {
        rc = run_step(&pre->steps[i], text, len, pieces, &other, err);
        swap = *pieces;
        *pieces = other;
        other = swap;
    }
    pretokenizer_pieces_release(&other);
    return rc;
}

void pretokenizer_pieces_release(struct pretokenizer_pieces *pieces)
{
    free(pieces->items);
    *pieces = (struct pretokenizer_pieces){0};
}
