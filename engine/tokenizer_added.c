#include "engine/tokenizer_added.h"

#include <stdlib.h>
#include <string.h>

int tokenizer_added_add(struct tokenizer_added *added, const struct tokenizer_added_token *token,
                        struct err *err)
{
    if (added->count == added->capacity) {
        size_t capacity = added->capacity ? added->capacity * 2 : 32;
        struct tokenizer_added_token *grown =
            reallocarray(added->items, capacity, sizeof *added->items);

        if (grown == NULL)
            return err_set(err, ERR_NO_MEMORY, "out of memory");
        added->items = grown;
        added->capacity = capacity;
    }
    added->items[added->count++] = *token;
    added->starts_with[(unsigned char)token->content[0]] = true;
    return 0;
}

static int compare(const char *a, size_t a_len, const char *b, size_t b_len)
{
    int order = memcmp(a, b, a_len < b_len ? a_len : b_len);

    return order != 0 ? order : (a_len > b_len) - (a_len < b_len);
}

static int by_content(const void *a, const void *b)
{
    const struct tokenizer_added_token *x = a, *y = b;

    return compare(x->content, x->len, y->content, y->len);
}

int tokenizer_added_sort(struct tokenizer_added *added, struct err *err)
{
    if (added->count > 0)
        qsort(added->items, added->count, sizeof *added->items, by_content);
    for (size_t i = 1; i < added->count; i++) {
        if (by_content(&added->items[i - 1], &added->items[i]) == 0)
            return err_set(err, ERR_INVALID, "added token \"%.64s\" is there twice",
                           added->items[i].content);
    }
    return 0;
}

void tokenizer_added_release(struct tokenizer_added *added)
{
    for (size_t i = 0; i < added->count; i++)
        free(added->items[i].content);
    free(added->items);
    *added = (struct tokenizer_added){0};
}

const struct tokenizer_added_token *tokenizer_added_find(const struct tokenizer_added *added,
                                                         const char *content, size_t len)
{
    size_t low = 0, high = added->count;

    while (low < high) {
        size_t middle = (low + high) / 2;
        const struct tokenizer_added_token *t = &added->items[middle];
        int order = compare(content, len, t->content, t->len);

        if (order == 0)
            return t;
        if (order < 0)
            high = middle;
        else
            low = middle + 1;
    }
    return NULL;
}

/* First item of [low, high), which agree on `depth` bytes, whose next byte is not below `byte`. A
 * content that ends there comes first. */
static size_t narrow(const struct tokenizer_added *added, size_t low, size_t high, size_t depth,
                     int byte)
{
    while (low < high) {
        size_t middle = (low + high) / 2;
        const struct tokenizer_added_token *t = &added->items[middle];
        int there = depth < t->len ? (unsigned char)t->content[depth] : -1;

        if (there < byte)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* The longest content that the text begins with: a walk down the trie that the sorted list is. */
static const struct tokenizer_added_token *longest(const struct tokenizer_added *added,
                                                   const char *text, size_t len)
{
    const struct tokenizer_added_token *best = NULL;
    size_t low = 0, high = added->count;

    for (size_t depth = 0; depth < len; depth++) {
        int byte = (unsigned char)text[depth];

        low = narrow(added, low, high, depth, byte);
        high = narrow(added, low, high, depth, byte + 1);
        if (low == high)
            break;
        if (added->items[low].len == depth + 1)
            best = &added->items[low];
    }
    return best;
}

/* Bytes of the white space character (Unicode White_Space) at `s`, or 0. */
static size_t space_at(const char *s, size_t len)
{
    static const char *const wide[] = {"\xc2\x85", "\u00a0", "\u1680", "\u2000", "\u2001",
                                       "\u2002",   "\u2003", "\u2004", "\u2005", "\u2006",
                                       "\u2007",   "\u2008", "\u2009", "\u200a", "\u2028",
                                       "\u2029",   "\u202f", "\u205f", "\u3000"};

    if (len > 0 && (s[0] == ' ' || (s[0] >= '\t' && s[0] <= '\r')))
        return 1;
    for (size_t i = 0; i < sizeof wide / sizeof *wide; i++) {
        size_t n = strlen(wide[i]);

        if (len >= n && memcmp(s, wide[i], n) == 0)
            return n;
    }
    return 0;
}

static size_t spaces_before(const char *text, size_t end)
{
    size_t start = end;

    for (;;) {
        size_t n = 1;

        while (n < 3 && n < start && ((unsigned char)text[start - n] & 0xc0) == 0x80)
            n++;
        if (start == 0 || space_at(text + start - n, n) != n)
            return start;
        start -= n;
    }
}

static size_t spaces_behind(const char *text, size_t len, size_t start)
{
    size_t n;

    while ((n = space_at(text + start, len - start)) > 0)
        start += n;
    return start;
}

struct tokenizer_added_match tokenizer_added_next(const struct tokenizer_added *added,
                                                  const char *text, size_t len, size_t from,
                                                  size_t taken, bool skip_special)
{
    struct tokenizer_added_match match = {.token = NULL};

    for (size_t i = from; i < len; i++) {
        const struct tokenizer_added_token *t;

        if (!added->starts_with[(unsigned char)text[i]])
            continue;
        t = longest(added, text + i, len - i);
        if (t == NULL)
            continue;
        if (t->special && skip_special) {
            i += t->len - 1;
            continue;
        }
        match.token = t;
        match.start = i;
        match.resume = match.end = i + t->len;
        if (t->lstrip) {
            size_t start = spaces_before(text, i);

            match.start = start > taken ? start : taken;
        }
        if (t->rstrip)
            match.end = spaces_behind(text, len, match.end);
        break;
    }
    return match;
}
