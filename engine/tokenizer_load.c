/* tokenizer.json → struct tokenizer. */
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/json_text.h"
#include "engine/tokenizer_parts.h"

/* GPT-2's letters for bytes: printable Latin-1 stand for themselves, the other 68 bytes, in order,
 * for U+0100 and up. */
static uint32_t letter_of_byte(unsigned char byte)
{
    if ((byte >= 33 && byte <= 126) || (byte >= 161 && byte != 173))
        return byte;
    if (byte <= 32)
        return 256u + byte;
    return byte == 173 ? 256u + 67 : 256u + 33 + (byte - 127u);
}

int tokenizer_byte_spelling(unsigned char byte, char out[2])
{
    uint32_t c = letter_of_byte(byte);

    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    out[0] = (char)(0xc0 | c >> 6);
    out[1] = (char)(0x80 | (c & 63));
    return 2;
}

/* Byte of a letter, or -1. */
static int byte_of_letter(uint32_t c)
{
    if ((c >= 33 && c <= 126) || (c >= 161 && c <= 255 && c != 173))
        return (int)c;
    if (c >= 256 && c <= 288)
        return (int)(c - 256);
    if (c > 288 && c < 256 + 67)
        return (int)(c - 289 + 127);
    return c == 256 + 67 ? 173 : -1;
}

/* The bytes of a name in byte-level letters; a name with another character stands for itself.
 * Returns how many bytes; at most `len`. */
static size_t spell_out(const char *name, size_t len, char *out)
{
    size_t n = 0;

    for (size_t i = 0; i < len;) {
        unsigned char c = (unsigned char)name[i];
        int byte = -1;

        if (c < 0x80) {
            byte = byte_of_letter(c);
            i += 1;
        } else if (c < 0xe0 && i + 1 < len) {
            byte = byte_of_letter((c & 31u) << 6 | ((unsigned char)name[i + 1] & 63u));
            i += 2;
        }
        if (byte < 0) {
            memcpy(out, name, len);
            return len;
        }
        out[n++] = (char)byte;
    }
    return n;
}

static uint64_t hash_name(const char *name, size_t len)
{
    uint64_t h = 0xcbf29ce484222325u;

    for (size_t i = 0; i < len; i++)
        h = (h ^ (unsigned char)name[i]) * 0x100000001b3u;
    return h ^ h >> 32;
}

int32_t tokenizer_find(const struct tokenizer *tokenizer, const char *name, size_t len)
{
    size_t mask = tokenizer->index_slots - 1;

    for (size_t i = hash_name(name, len) & mask;; i = (i + 1) & mask) {
        int32_t id = tokenizer->index[i];

        if (id < 0)
            return -1;
        if (tokenizer->tokens[id].name_len == len &&
            memcmp(tokenizer->tokens[id].name, name, len) == 0)
            return id;
    }
}

static int refuse_if_set(const json_t *model, const char *key, struct err *err)
{
    const json_t *value = json_object_get(model, key);
    bool set = json_is_true(value) || (json_is_string(value) && json_string_length(value) > 0) ||
               (json_is_number(value) && json_number_value(value) != 0) || json_is_object(value) ||
               json_is_array(value);

    return set ? err_set(err, ERR_INVALID, "model: \"%s\" is not supported yet", key) : 0;
}

static int check_model(const json_t *model, struct err *err)
{
    static const char *const unsupported[] = {"dropout", "continuing_subword_prefix",
                                              "end_of_word_suffix", "byte_fallback"};
    const json_t *type = json_object_get(model, "type");

    if (!json_is_object(model))
        return err_set(err, ERR_INVALID, "\"model\" is missing");
    if (type != NULL && (!json_is_string(type) || strcmp(json_string_value(type), "BPE") != 0))
        return err_set(err, ERR_INVALID,
                       "model \"%.32s\" is not supported yet; supported: byte-level BPE",
                       json_is_string(type) ? json_string_value(type) : "");
    for (size_t i = 0; i < sizeof unsupported / sizeof *unsupported; i++) {
        if (refuse_if_set(model, unsupported[i], err) != 0)
            return -1;
    }
    if (!json_is_object(json_object_get(model, "vocab")) ||
        !json_is_array(json_object_get(model, "merges")))
        return err_set(err, ERR_INVALID, "model: \"vocab\" must be an object, \"merges\" an array");
    return 0;
}

static int check_rest(const json_t *root, struct err *err)
{
    const json_t *normalizer = json_object_get(root, "normalizer");
    const json_t *decoder = json_object_get(root, "decoder");
    const char *type = json_string_value(json_object_get(normalizer, "type"));
    const json_t *list = json_object_get(normalizer, "normalizers");

    if (json_is_object(normalizer) && !(type != NULL && strcmp(type, "Sequence") == 0 &&
                                        json_is_array(list) && json_array_size(list) == 0))
        return err_set(err, ERR_INVALID, "normalizer \"%.32s\" is not supported yet",
                       type != NULL ? type : "");
    type = json_string_value(json_object_get(decoder, "type"));
    if (json_is_object(decoder) && (type == NULL || strcmp(type, "ByteLevel") != 0))
        return err_set(err, ERR_INVALID,
                       "decoder \"%.32s\" is not supported yet; supported: ByteLevel",
                       type != NULL ? type : "");
    return 0;
}

static int token_id(const json_t *value, int32_t *id, const char *name, struct err *err)
{
    if (strlen(name) > TOKENIZER_MAX_NAME - 2)
        return err_set(err, ERR_INVALID, "token \"%.64s…\" has more than %d bytes", name,
                       TOKENIZER_MAX_NAME - 2);
    if (!json_is_integer(value) || json_integer_value(value) < 0 ||
        json_integer_value(value) >= TOKENIZER_MAX_TOKENS)
        return err_set(err, ERR_INVALID, "token \"%.64s\" must have an id from 0 to %d", name,
                       TOKENIZER_MAX_TOKENS - 1);
    *id = (int32_t)json_integer_value(value);
    return 0;
}

/* Highest id, and bytes of all names. */
static int measure(const json_t *vocab, const json_t *added, int32_t *size, size_t *bytes,
                   struct err *err)
{
    const char *name;
    json_t *value;
    size_t i;
    int32_t id = 0;

    *size = 0;
    *bytes = 1;
    json_object_foreach((json_t *)vocab, name, value)
    {
        if (token_id(value, &id, name, err) != 0)
            return -1;
        *size = id >= *size ? id + 1 : *size;
        *bytes += strlen(name);
    }
    json_array_foreach(added, i, value)
    {
        name = json_string_value(json_object_get(value, "content"));
        if (name == NULL || name[0] == '\0')
            return err_set(err, ERR_INVALID, "added_tokens: each needs a \"content\"");
        if (token_id(json_object_get(value, "id"), &id, name, err) != 0)
            return -1;
        *size = id >= *size ? id + 1 : *size;
        *bytes += strlen(name);
    }
    if (*size == 0)
        return err_set(err, ERR_INVALID, "the vocabulary is empty");
    return 0;
}

static int allocate(struct tokenizer *t, int32_t size, size_t bytes, struct err *err)
{
    t->size = size;
    t->tokens = calloc((size_t)size, sizeof *t->tokens);
    t->text = malloc(2 * bytes);
    t->index_slots = 16;
    while (t->index_slots < 2 * (size_t)size)
        t->index_slots *= 2;
    t->index = malloc(t->index_slots * sizeof *t->index);
    if (t->tokens == NULL || t->text == NULL || t->index == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    for (size_t i = 0; i < t->index_slots; i++)
        t->index[i] = -1;
    return 0;
}

/* Puts a token at its id; *at: free place in `text`. */
static int place(struct tokenizer *t, const char *name, int32_t id, bool added, char **at,
                 struct err *err)
{
    struct tokenizer_token *token = &t->tokens[id];
    size_t len = strlen(name), slot;

    if (token->name != NULL)
        return err_set(err, ERR_INVALID, "tokens \"%.*s\" and \"%.64s\" have the same id %d",
                       (int)(token->name_len < 64 ? token->name_len : 64), token->name, name, id);
    memcpy(*at, name, len);
    token->name = *at;
    token->name_len = (uint32_t)len;
    *at += len;
    token->piece = token->name;
    token->piece_len = token->name_len;
    if (!added) {
        token->piece = *at;
        token->piece_len = (uint32_t)spell_out(name, len, *at);
        *at += token->piece_len;
    }
    slot = hash_name(name, len) & (t->index_slots - 1);
    while (t->index[slot] >= 0)
        slot = (slot + 1) & (t->index_slots - 1);
    t->index[slot] = id;
    return 0;
}

static bool is_true(const json_t *object, const char *key)
{
    return json_is_true(json_object_get(object, key));
}

static int add_added(struct tokenizer *t, const json_t *spec, char **at, struct err *err)
{
    const char *content = json_string_value(json_object_get(spec, "content"));
    struct tokenizer_added_token token = {
        .len = strlen(content),
        .id = (int32_t)json_integer_value(json_object_get(spec, "id")),
        .special = is_true(spec, "special"),
        .lstrip = is_true(spec, "lstrip"),
        .rstrip = is_true(spec, "rstrip"),
    };
    int32_t there = tokenizer_find(t, content, token.len);
    struct tokenizer_token *place_of = &t->tokens[token.id];

    if (is_true(spec, "single_word"))
        return err_set(err, ERR_INVALID, "added token \"%.64s\": single_word is not supported yet",
                       content);
    if (there >= 0 && there != token.id)
        return err_set(err, ERR_INVALID,
                       "added token \"%.64s\" has id %d, but %d in the vocabulary", content,
                       token.id, there);
    if (there < 0 && place(t, content, token.id, true, at, err) != 0)
        return -1;
    place_of->piece = place_of->name;
    place_of->piece_len = place_of->name_len;
    place_of->special = token.special;
    token.content = strdup(content);
    if (token.content == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    if (tokenizer_added_add(&t->added[is_true(spec, "normalized")], &token, err) != 0) {
        free(token.content);
        return -1;
    }
    return 0;
}

static int load_tokens(struct tokenizer *t, const json_t *vocab, const json_t *added,
                       struct err *err)
{
    const char *name;
    json_t *value;
    size_t bytes = 0, i;
    int32_t size = 0;
    char *at;

    if (added != NULL && !json_is_null(added) && !json_is_array(added))
        return err_set(err, ERR_INVALID, "\"added_tokens\" must be an array");
    if (measure(vocab, added, &size, &bytes, err) != 0 || allocate(t, size, bytes, err) != 0)
        return -1;
    at = t->text;
    json_object_foreach((json_t *)vocab, name, value)
    {
        if (place(t, name, (int32_t)json_integer_value(value), false, &at, err) != 0)
            return -1;
    }
    json_array_foreach(added, i, value)
    {
        if (add_added(t, value, &at, err) != 0)
            return -1;
    }
    for (i = 0; i < t->added[0].count; i++) {
        for (size_t k = 0; k < t->added[1].count; k++) {
            if (t->added[0].items[i].id == t->added[1].items[k].id)
                return err_set(err, ERR_INVALID, "added token \"%.64s\" is there twice",
                               t->added[0].items[i].content);
        }
    }
    if (tokenizer_added_sort(&t->added[0], err) != 0)
        return -1;
    return tokenizer_added_sort(&t->added[1], err);
}

/* "a b" or ["a", "b"]. */
static int split_merge(const json_t *item, const char *part[2], size_t len[2], struct err *err)
{
    if (json_is_string(item)) {
        const char *space = strchr(json_string_value(item), ' ');

        if (space == NULL || strchr(space + 1, ' ') != NULL)
            return err_set(err, ERR_INVALID, "merges: \"%.64s\" must be two parts and one space",
                           json_string_value(item));
        part[0] = json_string_value(item);
        len[0] = (size_t)(space - part[0]);
        part[1] = space + 1;
        len[1] = strlen(part[1]);
        return 0;
    }
    for (size_t i = 0; i < 2; i++) {
        part[i] = json_string_value(json_array_get(item, i));
        if (part[i] == NULL || json_array_size(item) != 2)
            return err_set(err, ERR_INVALID, "merges: each must be a text or a pair of texts");
        len[i] = strlen(part[i]);
    }
    return 0;
}

static int load_merge(struct tokenizer *t, const json_t *item, uint32_t rank, struct err *err)
{
    struct tokenizer_merge merge = {.rank = rank};
    const char *part[2];
    size_t len[2];
    char joined[TOKENIZER_MAX_NAME];

    if (split_merge(item, part, len, err) != 0)
        return -1;
    if (len[0] + len[1] > sizeof joined)
        return err_set(err, ERR_INVALID, "merges: a token of more than %zu bytes", sizeof joined);
    memcpy(joined, part[0], len[0]);
    memcpy(joined + len[0], part[1], len[1]);
    merge.left = tokenizer_find(t, part[0], len[0]);
    merge.right = tokenizer_find(t, part[1], len[1]);
    merge.result = tokenizer_find(t, joined, len[0] + len[1]);
    if (merge.left < 0 || merge.right < 0 || merge.result < 0)
        return err_set(err, ERR_INVALID,
                       "merges: \"%.*s\" and \"%.*s\" merge to what is not in the vocabulary, or "
                       "are not in it",
                       (int)(len[0] < 64 ? len[0] : 64), part[0], (int)(len[1] < 64 ? len[1] : 64),
                       part[1]);
    tokenizer_merges_set(&t->merges, merge);
    return 0;
}

static int load_model(struct tokenizer *t, const json_t *model, struct err *err)
{
    const json_t *merges = json_object_get(model, "merges");
    const json_t *unknown = json_object_get(model, "unk_token");

    for (int byte = 0; byte < 256; byte++) {
        char letter[2];
        int n = tokenizer_byte_spelling((unsigned char)byte, letter);

        t->byte_ids[byte] = tokenizer_find(t, letter, (size_t)n);
    }
    t->unknown = -1;
    if (json_is_string(unknown)) {
        t->unknown = tokenizer_find(t, json_string_value(unknown), json_string_length(unknown));
        if (t->unknown < 0)
            return err_set(err, ERR_INVALID, "unk_token \"%.64s\" is not in the vocabulary",
                           json_string_value(unknown));
    }
    t->fuse_unknown = is_true(model, "fuse_unk");
    t->ignore_merges = is_true(model, "ignore_merges");
    if (tokenizer_merges_init(&t->merges, json_array_size(merges), err) != 0)
        return -1;
    for (size_t i = 0; i < json_array_size(merges); i++) {
        if (load_merge(t, json_array_get(merges, i), (uint32_t)i, err) != 0)
            return -1;
    }
    return 0;
}

int tokenizer_load(struct tokenizer *t, const char *json, size_t len, struct err *err)
{
    const json_t *model, *pre;
    json_t *root = json_text_load(json, len, 0, err);
    int rc = -1;

    if (root == NULL)
        return -1;
    model = json_object_get(root, "model");
    pre = json_object_get(root, "pre_tokenizer");
    if (check_model(model, err) != 0 || check_rest(root, err) != 0)
        goto out;
    if (!json_is_object(pre)) {
        err_set(err, ERR_INVALID,
                "\"pre_tokenizer\" is missing; only byte-level BPE is supported "
                "yet");
        goto out;
    }
    if (pretokenizer_open(&t->pre, pre, err) != 0 ||
        load_tokens(t, json_object_get(model, "vocab"), json_object_get(root, "added_tokens"),
                    err) != 0)
        goto out;
    rc = load_model(t, model, err);
out:
    json_decref(root);
    return rc;
}
