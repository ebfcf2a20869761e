#include "engine/import_gguf_tokenizer.h"

#include <string.h>

#include "engine/base/strbuf.h"
#include "engine/base/utf8.h"
#include "engine/tokenizer.h"

/* As the models' own tokenizer.json have it. */
#define BYTE_LEVEL \
    "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":true}"
#define BYTES_ONLY                                                              \
    "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true," \
    "\"use_regex\":false}"
#define DIGITS "{\"type\":\"Digits\",\"individual_digits\":true}"
#define SEQUENCE(a, b) "{\"type\":\"Sequence\",\"pretokenizers\":[" a "," b "]}"
#define SPLIT(regex)                                                                       \
    "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" regex "\"},\"behavior\":\"Isolated\"," \
    "\"invert\":false}"
#define WORDS(digits)                                                              \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?\\\\p{L}+|" digits \
    "| ?[^\\\\s\\\\p{L}\\\\p{N}]+[\\\\r\\\\n]*|\\\\s*[\\\\r\\\\n]+|\\\\s+(?!\\\\S)|\\\\s+"

static const struct pre {
    const char *name, *json;
    bool ignore_merges;
} pres[] = {
    {"smollm", SEQUENCE(DIGITS, BYTE_LEVEL), false},
    {"llama-bpe", SEQUENCE(SPLIT(WORDS("\\\\p{N}{1,3}")), BYTES_ONLY), true},
    {"gpt-2", BYTE_LEVEL, false},
};

enum { /* tokenizer.ggml.token_type */
       TYPE_UNKNOWN = 2,
       TYPE_CONTROL = 3,
       TYPE_USER_DEFINED = 4,
};

static int unknown_pre(const struct gguf_string *name, struct err *err)
{
    struct strbuf known;

    strbuf_init(&known, 1000);
    for (size_t i = 0; i < sizeof pres / sizeof *pres; i++)
        strbuf_addf(&known, "%s%s", i > 0 ? ", " : "", pres[i].name);
    err_set(err, ERR_INVALID,
            "pre-tokenizer \"%.*s\" (tokenizer.ggml.pre) is not supported yet; supported: %s. "
            "Import the Hugging Face directory instead",
            (int)(name->len < 32 ? name->len : 32), name->len > 0 ? name->data : "", known.data);
    strbuf_release(&known);
    return -1;
}

static int find_pre(const struct gguf *file, const struct pre **out, struct err *err)
{
    struct gguf_string model, name;

    if (gguf_get_string(file, "tokenizer.ggml.model", &model, err) != 0 ||
        gguf_get_string(file, "tokenizer.ggml.pre", &name, err) != 0)
        return -1;
    if (model.len != 4 || memcmp(model.data, "gpt2", 4) != 0)
        return err_set(err, ERR_INVALID,
                       "tokenizer \"%.*s\" is not supported yet; supported: gpt2 (byte-level BPE)",
                       (int)(model.len < 32 ? model.len : 32), model.len > 0 ? model.data : "");
    for (size_t i = 0; i < sizeof pres / sizeof *pres; i++) {
        if (name.len == strlen(pres[i].name) && memcmp(name.data, pres[i].name, name.len) == 0) {
            *out = &pres[i];
            return 0;
        }
    }
    return unknown_pre(&name, err);
}

static int add_string(struct strbuf *out, struct gguf_string s, struct err *err)
{
    if (s.len == 0 || !utf8_valid(s.data, s.len) || memchr(s.data, '\0', s.len) != NULL)
        return err_set(err, ERR_INVALID,
                       "a token or merge is empty, holds a 0 byte, or is not UTF-8");
    strbuf_addch(out, '"');
    for (size_t i = 0; i < s.len; i++) {
        unsigned char c = (unsigned char)s.data[i];

        if (c == '"' || c == '\\')
            strbuf_addch(out, '\\');
        if (c < 0x20)
            strbuf_addf(out, "\\u%04x", c);
        else
            strbuf_addch(out, (char)c);
    }
    strbuf_addch(out, '"');
    return 0;
}

static int get_arrays(const struct gguf *file, struct gguf_array *tokens, struct gguf_array *types,
                      struct gguf_array *merges, struct err *err)
{
    if (gguf_get_array(file, "tokenizer.ggml.tokens", tokens, err) != 0 ||
        gguf_get_array(file, "tokenizer.ggml.token_type", types, err) != 0 ||
        gguf_get_array(file, "tokenizer.ggml.merges", merges, err) != 0)
        return -1;
    if (tokens->data == NULL || tokens->kind != GGUF_KIND_STRING || merges->data == NULL ||
        merges->kind != GGUF_KIND_STRING)
        return err_set(err, ERR_INVALID,
                       "\"tokenizer.ggml.tokens\" and \"tokenizer.ggml.merges\" must be arrays of "
                       "strings");
    if (tokens->count > TOKENIZER_MAX_TOKENS)
        return err_set(err, ERR_INVALID, "the tokenizer has %llu tokens; at most %d are allowed",
                       (unsigned long long)tokens->count, TOKENIZER_MAX_TOKENS);
    if (types->kind != GGUF_KIND_I32 || types->count != tokens->count)
        return err_set(err, ERR_INVALID,
                       "\"tokenizer.ggml.token_type\" must have one 32-bit integer for each token");
    return 0;
}

/* Control tokens are special, user-defined ones are matched in any text. */
static int add_added_tokens(struct strbuf *out, const struct gguf_array *tokens,
                            const struct gguf_array *types, struct err *err)
{
    const unsigned char *at = tokens->data;
    const char *comma = "";

    strbuf_addstr(out, "\"added_tokens\":[");
    for (uint64_t i = 0; i < tokens->count; i++) {
        struct gguf_string token = gguf_next_string(&at);
        int64_t type = gguf_array_int(types, i);

        if (type != TYPE_UNKNOWN && type != TYPE_CONTROL && type != TYPE_USER_DEFINED)
            continue;
        strbuf_addf(out, "%s{\"id\":%llu,\"content\":", comma, (unsigned long long)i);
        if (add_string(out, token, err) != 0)
            return -1;
        strbuf_addf(out,
                    ",\"single_word\":false,\"lstrip\":false,\"rstrip\":false,"
                    "\"normalized\":false,\"special\":%s}",
                    type == TYPE_USER_DEFINED ? "false" : "true");
        comma = ",";
    }
    strbuf_addstr(out, "],");
    return 0;
}

static int add_model(struct strbuf *out, const struct gguf_array *tokens,
                     const struct gguf_array *merges, bool ignore_merges, struct err *err)
{
    const unsigned char *at = tokens->data;

    strbuf_addf(out,
                "\"model\":{\"type\":\"BPE\",\"dropout\":null,\"unk_token\":null,"
                "\"continuing_subword_prefix\":null,\"end_of_word_suffix\":null,"
                "\"fuse_unk\":false,\"byte_fallback\":false,\"ignore_merges\":%s,\"vocab\":{",
                ignore_merges ? "true" : "false");
    for (uint64_t i = 0; i < tokens->count; i++) {
        if (i > 0)
            strbuf_addch(out, ',');
        if (add_string(out, gguf_next_string(&at), err) != 0)
            return -1;
        strbuf_addf(out, ":%llu", (unsigned long long)i);
    }
    strbuf_addstr(out, "},\"merges\":[");
    at = merges->data;
    for (uint64_t i = 0; i < merges->count; i++) {
        if (i > 0)
            strbuf_addch(out, ',');
        if (add_string(out, gguf_next_string(&at), err) != 0)
            return -1;
    }
    strbuf_addstr(out, "]}}");
    return 0;
}

int import_gguf_tokenizer(const struct gguf *file, char **text, size_t *len, struct err *err)
{
    struct gguf_array tokens, types, merges;
    const struct pre *pre = NULL;
    struct strbuf out;

    if (find_pre(file, &pre, err) != 0 || get_arrays(file, &tokens, &types, &merges, err) != 0)
        return -1;
    strbuf_init(&out, TOKENIZER_MAX_JSON);
    strbuf_addf(&out,
                "{\"version\":\"1.0\",\"truncation\":null,\"padding\":null,\"normalizer\":null,"
                "\"pre_tokenizer\":%s,\"post_processor\":null,\"decoder\":%s,",
                pre->json, BYTE_LEVEL);
    if (add_added_tokens(&out, &tokens, &types, err) != 0 ||
        add_model(&out, &tokens, &merges, pre->ignore_merges, err) != 0) {
        strbuf_release(&out);
        return -1;
    }
    if (strbuf_failed(&out)) {
        strbuf_release(&out);
        return err_set(err, ERR_INVALID, "the tokenizer needs more than %u bytes as JSON",
                       TOKENIZER_MAX_JSON);
    }
    *text = strbuf_detach(&out, len);
    return *text != NULL ? 0 : err_set(err, ERR_NO_MEMORY, "out of memory");
}
