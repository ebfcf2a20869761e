#include "engine/tokenizer.h"

#include <stdlib.h>
#include <string.h>

#include "engine/base/utf8.h"
#include "engine/tokenizer_parts.h"

void token_list_init(struct token_list *list)
{
    *list = (struct token_list){0};
}

void token_list_release(struct token_list *list)
{
    free(list->ids);
    free(list->starts);
    *list = (struct token_list){0};
}

int token_list_add(struct token_list *list, int32_t id, uint32_t start, struct err *err)
{
    if (list->count == list->capacity) {
        size_t capacity = list->capacity ? list->capacity * 2 : 64;
        int32_t *ids = reallocarray(list->ids, capacity, sizeof *ids);
        uint32_t *starts = NULL;

        if (ids != NULL) {
            list->ids = ids;
            starts = reallocarray(list->starts, capacity, sizeof *starts);
        }
        if (starts == NULL)
            return err_set(err, ERR_NO_MEMORY, "out of memory");
        list->starts = starts;
        list->capacity = capacity;
    }
    list->ids[list->count] = id;
    list->starts[list->count++] = start;
    return 0;
}

int tokenizer_open(struct tokenizer **out, const char *json, size_t len, struct err *err)
{
    struct tokenizer *t;

    if (len > TOKENIZER_MAX_JSON)
        return err_set(err, ERR_INVALID, "has %zu bytes; at most %u are allowed", len,
                       TOKENIZER_MAX_JSON);
    t = calloc(1, sizeof *t);
    if (t == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    if (tokenizer_load(t, json, len, err) != 0) {
        tokenizer_free(t);
        return -1;
    }
    *out = t;
    return 0;
}

void tokenizer_free(struct tokenizer *t)
{
    if (t == NULL)
        return;
    tokenizer_added_release(&t->added[0]);
    tokenizer_added_release(&t->added[1]);
    pretokenizer_free(t->pre);
    tokenizer_merges_release(&t->merges);
    free(t->index);
    free(t->text);
    free(t->tokens);
    free(t);
}

/* One call of tokenizer_encode. */
struct encoding {
    const struct tokenizer *tokenizer;
    bool skip_special;
    struct token_list *out;
    struct tokenizer_bpe bpe;
    struct pretokenizer_pieces pieces;
};

/* Is the piece a token as a whole? Its id, or -1. */
static int32_t whole_token(const struct tokenizer *t, const char *piece, size_t len)
{
    char name[TOKENIZER_MAX_NAME];
    size_t n = 0;

    for (size_t i = 0; i < len; i++) {
        if (n + 2 >
            sizeof name) /* no token of a sensible vocabulary is so long; the merges decide */
            return -1;
        n += (size_t)tokenizer_byte_spelling((unsigned char)piece[i], name + n);
    }
    return tokenizer_find(t, name, n);
}

/* `start`: of the piece in the caller's text. */
static int encode_piece(struct encoding *e, const char *piece, size_t len, uint32_t start,
                        struct err *err)
{
    const struct tokenizer *t = e->tokenizer;
    bool in_unknown = false;

    if (t->ignore_merges) {
        int32_t id = whole_token(t, piece, len);

        if (id >= 0)
            return token_list_add(e->out, id, start, err);
    }
    for (size_t i = 0; i < len; i++) {
        int32_t id = t->byte_ids[(unsigned char)piece[i]];
        bool unknown = id < 0;

        if (unknown && t->unknown >= 0 && !(in_unknown && t->fuse_unknown))
            id = t->unknown;
        in_unknown = unknown;
        if (id >= 0 && tokenizer_bpe_add_symbol(&e->bpe, id, start + (uint32_t)i, err) != 0)
            return -1;
    }
    return tokenizer_bpe_run(&e->bpe, &t->merges, e->out, err);
}

static int encode_pieces(struct encoding *e, const char *text, size_t len, uint32_t start,
                         struct err *err)
{
    if (pretokenizer_split(e->tokenizer->pre, text, len, &e->pieces, err) != 0)
        return -1;
    for (size_t i = 0; i < e->pieces.count; i++) {
        const struct pretokenizer_piece *p = &e->pieces.items[i];

        if (encode_piece(e, text + p->start, p->len, start + p->start, err) != 0)
            return -1;
    }
    return 0;
}

/* Text without added tokens. */
static int encode_plain(struct encoding *e, const char *text, size_t len, uint32_t start,
                        struct err *err)
{
    size_t first = e->out->count;
    char *spaced;
    int rc;

    if (len == 0)
        return 0;
    if (!pretokenizer_adds_space(e->tokenizer->pre) || text[0] == ' ')
        return encode_pieces(e, text, len, start, err);
    spaced = malloc(len + 1);
    if (spaced == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    spaced[0] = ' ';
    memcpy(spaced + 1, text, len);
    rc = encode_pieces(e, spaced, len + 1, start, err);
    free(spaced);
    for (size_t i = first; i < e->out->count; i++) /* the space is not the caller's */
        e->out->starts[i] -= e->out->starts[i] > start;
    return rc;
}

/* Cuts at the added tokens of a pass; what is between goes to the next. */
static int encode_pass(struct encoding *e, int pass, const char *text, size_t len, uint32_t start,
                       struct err *err)
{
    const struct tokenizer_added *added = &e->tokenizer->added[pass];
    size_t taken = 0, from = 0;

    for (;;) {
        struct tokenizer_added_match m =
            tokenizer_added_next(added, text, len, from, taken, e->skip_special);
        size_t end = m.token != NULL ? m.start : len;
        int rc = 0;

        if (end > taken)
            rc = pass == 0
                     ? encode_pass(e, 1, text + taken, end - taken, start + (uint32_t)taken, err)
                     : encode_plain(e, text + taken, end - taken, start + (uint32_t)taken, err);
        if (rc != 0 || m.token == NULL)
            return rc;
        if (token_list_add(e->out, m.token->id, start + (uint32_t)m.start, err) != 0)
            return -1;
        taken = m.end;
        from = m.resume;
    }
}

int tokenizer_encode(const struct tokenizer *tokenizer, const char *text, size_t len,
                     bool allow_special, struct token_list *out, struct err *err)
{
    struct encoding e = {.tokenizer = tokenizer, .skip_special = !allow_special, .out = out};
    size_t before = out->count;
    int rc;

    if (len >= UINT32_MAX)
        return err_set(err, ERR_INVALID, "a text of %zu bytes is too long to tokenize", len);
    if (!utf8_valid(text, len))
        return err_set(err, ERR_INVALID, "the text is not valid UTF-8");
    rc = encode_pass(&e, 0, text, len, 0, err);
    if (rc != 0)
        out->count = before;
    pretokenizer_pieces_release(&e.pieces);
    tokenizer_bpe_release(&e.bpe);
    return rc;
}

const char *tokenizer_piece(const struct tokenizer *tokenizer, int32_t id, size_t *len)
{
    *len = 0;
    if (id < 0 || id >= tokenizer->size || tokenizer->tokens[id].name == NULL)
        return NULL;
    *len = tokenizer->tokens[id].piece_len;
    return tokenizer->tokens[id].piece;
}

bool tokenizer_is_special(const struct tokenizer *tokenizer, int32_t id)
{
    return id >= 0 && id < tokenizer->size && tokenizer->tokens[id].special;
}

int32_t tokenizer_added_token(const struct tokenizer *tokenizer, const char *content)
{
    size_t len = strlen(content);

    for (int pass = 0; pass < 2; pass++) {
        const struct tokenizer_added_token *token =
            tokenizer_added_find(&tokenizer->added[pass], content, len);

        if (token != NULL)
            return token->id;
    }
    return -1;
}

int32_t tokenizer_size(const struct tokenizer *tokenizer)
{
    return tokenizer->size;
}
