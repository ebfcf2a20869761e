#include "engine/chat_template_form.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/strbuf.h"

/* The forms, as Jinja; SYSTEM stands for any text inside a literal. */
#define SYSTEM "\x01"
#define FIRST "messages[0]['role'] != 'system'"
#define SYSTEM_TURN "{{ '<|im_start|>system\n" SYSTEM "<|im_end|>\n' }}{% endif %}"
#define TURN \
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
#define LOOP "{% for message in messages %}"
#define END "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
#define FLAG                                                                               \
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}" \
    "{% endif %}"

static const char *const forms[] = {
    LOOP TURN END,
    LOOP "{% if loop.first and " FIRST " %}" SYSTEM_TURN TURN END,
    "{% if " FIRST " %}" SYSTEM_TURN LOOP TURN END,
    FLAG LOOP TURN END,
    FLAG LOOP "{% if loop.first and " FIRST " %}" SYSTEM_TURN TURN END,
};

/* Marks in a normalized text; templates with such bytes are refused before. */
enum {
    MARK_TOKEN = 2,   /* a word or sign follows */
    MARK_LITERAL = 3, /* the text of a literal follows, escapes resolved */
    MARK_BLOCK = 4,   /* {% */
    MARK_PRINT = 5,   /* {{ */
};

struct reader {
    const char *p, *end;
    struct strbuf out;
    enum { OTHER, LITERAL, LITERAL_PLUS } last; /* 'a' + 'b' becomes 'ab' */
};

static void emit(struct reader *r, const char *token, size_t len)
{
    if (r->last == LITERAL && len == 1 && token[0] == '+') {
        r->last = LITERAL_PLUS;
        return;
    }
    if (r->last == LITERAL_PLUS) {
        strbuf_addch(&r->out, MARK_TOKEN);
        strbuf_addch(&r->out, '+');
    }
    strbuf_addch(&r->out, MARK_TOKEN);
    strbuf_add(&r->out, token, len);
    r->last = OTHER;
}

/* 'text' or "text"; false: not closed, or an escape that the forms do not use. */
static bool read_literal(struct reader *r)
{
    static const char escapes[] = "nt\\'\"", meanings[] = "\n\t\\'\"";
    char quote = *r->p++;

    if (r->last != LITERAL_PLUS)
        strbuf_addch(&r->out, MARK_LITERAL);
    r->last = LITERAL;
    while (r->p < r->end && *r->p != quote) {
        char c = *r->p++;

        if (c == '\\') {
            const char *escape = r->p < r->end ? strchr(escapes, *r->p) : NULL;

            if (escape == NULL || *escape == '\0')
                return false;
            r->p++;
            c = meanings[escape - escapes];
        }
        strbuf_addch(&r->out, c);
    }
    if (r->p == r->end)
        return false;
    r->p++;
    return true;
}

static bool is_word(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
}

/* message['role'] becomes message.role; false: it is another subscript. */
static bool read_subscript(struct reader *r)
{
    const char *name = r->p + 2, *p = name;

    if (r->end - r->p < 5 || (r->p[1] != '\'' && r->p[1] != '"'))
        return false;
    while (p < r->end && is_word(*p))
        p++;
    if (p == name || r->end - p < 2 || p[0] != r->p[1] || p[1] != ']')
        return false;
    emit(r, ".", 1);
    emit(r, name, (size_t)(p - name));
    r->p = p + 2;
    return true;
}

static bool read_token(struct reader *r)
{
    const char *start = r->p;

    if (*r->p == '\'' || *r->p == '"')
        return read_literal(r);
    if (*r->p == '[' && read_subscript(r))
        return true;
    if (!is_word(*r->p)) {
        emit(r, r->p++, 1);
        return true;
    }
    while (r->p < r->end && is_word(*r->p))
        r->p++;
    emit(r, start, (size_t)(r->p - start));
    return true;
}

static bool is_blank(char c)
{
    return c == ' ' || c == '\t' || c == '\n' || c == '\r';
}

/* A tag, at its "{"; *trims: it ends with -%} or -}}. */
static bool read_tag(struct reader *r, bool *trims)
{
    char close = r->p[1] == '%' ? '%' : '}';

    strbuf_addch(&r->out, close == '%' ? MARK_BLOCK : MARK_PRINT);
    r->last = OTHER;
    r->p += 2;
    if (r->p < r->end && *r->p == '-')
        r->p++;
    while (r->end - r->p >= 2) {
        *trims = r->end - r->p >= 3 && r->p[0] == '-' && r->p[1] == close && r->p[2] == '}';
        if (*trims || (r->p[0] == close && r->p[1] == '}')) {
            r->p += *trims ? 3 : 2;
            return r->last != LITERAL_PLUS;
        }
        if (is_blank(*r->p))
            r->p++;
        else if (!read_token(r))
            return false;
    }
    return false;
}

/* The text between two tags must print nothing. Blanks do not when a '-' of a neighbour takes them.
 * Where templates are run for chats, a newline behind a block and the blanks of a line in front of
 * one vanish too (trim_blocks, lstrip_blocks), and so does a last newline of the text. */
static bool skip_outside(struct reader *r, bool line_start, bool behind_block, bool trims)
{
    const char *start = r->p;

    while (r->p < r->end && is_blank(*r->p))
        r->p++;
    if (trims || (r->end - r->p >= 3 && r->p[0] == '{' && r->p[2] == '-'))
        return true;
    if (behind_block && start < r->p && *start == '\n') {
        line_start = true;
        start++;
    }
    if (r->p == r->end)
        return start == r->p || (r->p - start == 1 && *start == '\n');
    if (line_start && r->end - r->p >= 2 && r->p[1] == '%') {
        while (start < r->p && (*start == ' ' || *start == '\t'))
            start++;
    }
    return start == r->p;
}

/* The template's tags in marks; false: something in it is outside of what the forms use. */
static bool normalize(struct reader *r, const char *text, size_t len)
{
    bool behind_block = false, trims = false;

    r->p = text;
    r->end = text + len;
    r->last = OTHER;
    strbuf_reset(&r->out);
    while (r->p < r->end) {
        if (!skip_outside(r, r->p == text, behind_block, trims))
            return false;
        if (r->p == r->end)
            break;
        if (r->end - r->p < 2 || r->p[0] != '{' || (r->p[1] != '%' && r->p[1] != '{'))
            return false;
        behind_block = r->p[1] == '%';
        if (!read_tag(r, &trims))
            return false;
    }
    return !strbuf_failed(&r->out);
}

/* Does `text` equal `form` with some literal text in place of SYSTEM? */
static bool matches(const struct strbuf *text, const struct strbuf *form, const char **system,
                    size_t *system_len)
{
    const char *gap = memchr(form->data, SYSTEM[0], form->len);
    size_t head = gap != NULL ? (size_t)(gap - form->data) : form->len;
    size_t tail = gap != NULL ? form->len - head - 1 : 0;

    *system = NULL;
    if (gap == NULL)
        return text->len == form->len && memcmp(text->data, form->data, head) == 0;
    if (text->len < head + tail || memcmp(text->data, form->data, head) != 0 ||
        memcmp(text->data + text->len - tail, gap + 1, tail) != 0)
        return false;
    *system = text->data + head;
    *system_len = text->len - head - tail;
    for (size_t i = 0; i < *system_len; i++) {
        if ((unsigned char)(*system)[i] <= MARK_PRINT)
            return false;
    }
    return true;
}

static bool has_control_bytes(const char *text, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        if ((unsigned char)text[i] < 0x20 && !is_blank(text[i]))
            return true;
    }
    return false;
}

int chat_template_form_match(const char *text, size_t len, char **system, struct err *err)
{
    struct reader r, form;
    const char *found = NULL;
    size_t found_len = 0;
    bool matched = false;
    int rc = -1;

    *system = NULL;
    strbuf_init(&r.out, (size_t)1 << 24);
    strbuf_init(&form.out, 1 << 16);
    if (!has_control_bytes(text, len) && normalize(&r, text, len)) {
        for (size_t i = 0; !matched && i < sizeof forms / sizeof *forms; i++)
            matched = normalize(&form, forms[i], strlen(forms[i])) &&
                      matches(&r.out, &form.out, &found, &found_len);
    }
    if (!matched) {
        err_set(err, ERR_INVALID,
                "the model's chat template is not one of the forms of ChatML that are known (it "
                "begins with \"%.*s\"); other templates are not supported yet",
                (int)(len < 60 ? len : 60), text);
        goto out;
    }
    if (found != NULL) {
        *system = strndup(found, found_len);
        if (*system == NULL) {
            err_set(err, ERR_NO_MEMORY, "out of memory");
            goto out;
        }
    }
    rc = 0;
out:
    strbuf_release(&form.out);
    strbuf_release(&r.out);
    return rc;
}
