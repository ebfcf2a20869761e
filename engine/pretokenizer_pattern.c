#include "engine/pretokenizer_pattern.h"

#include <stdbool.h>
#include <string.h>

static int refuse(const char *at, size_t n, struct err *err)
{
    return err_set(err, ERR_INVALID, "pre_tokenizer: \"%.*s\" in a pattern is not supported yet",
                   (int)strnlen(at, n), at);
}

/* \p{Lu} and the like. Scripts and binary properties are not here: stand-ins (see
 * pretokenizer_unicode.h) keep the general category and nothing else. */
static int check_property(const char **p, struct err *err)
{
    static const char *const known[] = {"L",  "Lu", "Ll", "Lt", "Lm", "Lo", "M",  "Mn", "Mc",
                                        "Me", "N",  "Nd", "Nl", "No", "P",  "Pc", "Pd", "Ps",
                                        "Pe", "Pi", "Pf", "Po", "S",  "Sm", "Sc", "Sk", "So",
                                        "Z",  "Zs", "Zl", "Zp", "C",  "Cc", "Cf", "Co"};
    const char *name = *p + 3;
    size_t n;

    if ((*p)[2] != '{')
        return refuse(*p, 3, err);
    n = strcspn(name, "}");
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (strlen(known[i]) == n && memcmp(known[i], name, n) == 0 && name[n] == '}') {
            *p = name + n + 1;
            return 0;
        }
    }
    return refuse(*p, n + 4 < 24 ? n + 4 : 24, err);
}

static int check_escape(const char **p, struct err *err)
{
    char c = (*p)[1];

    if (c == 'p' || c == 'P')
        return check_property(p, err);
    if (c != '\0' && strchr("rntfsSdD\\/.,;:'\"`!?#%&@~^$*+-_=|<>()[]{} ", c) != NULL) {
        *p += 2;
        return 0;
    }
    return refuse(*p, 2, err);
}

/* A bracket class; *p is at '['. */
static int check_class(const char **p, struct err *err)
{
    const char *start = *p;

    (*p)++;
    if (**p == '^')
        (*p)++;
    if (**p == ']') /* "[]" means different things */
        return refuse(start, 3, err);
    while (**p != ']') {
        if (**p == '\0')
            return refuse(start, 8, err);
        if (**p == '[' || ((*p)[0] == '&' && (*p)[1] == '&'))
            return refuse(*p, 2, err);
        if (**p == '\\') {
            if (check_escape(p, err) != 0)
                return -1;
        } else {
            (*p)++;
        }
    }
    (*p)++;
    return 0;
}

/* What opens a group; *p is at '('. */
static int check_group(const char **p, struct err *err)
{
    static const char *const known[] = {"(?:", "(?i:", "(?=", "(?!", "(?<=", "(?<!", "(?>"};

    if ((*p)[1] != '?' && (*p)[1] != '*') {
        (*p)++;
        return 0;
    }
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        size_t n = strlen(known[i]);

        if (strncmp(*p, known[i], n) == 0) {
            *p += n;
            return 0;
        }
    }
    return refuse(*p, 4, err);
}

/* {n}, {n,} or {n,m}, not followed by what Ruby reads differently; *p is at '{'. */
static int check_counts(const char **p, struct err *err)
{
    const char *start = *p;
    size_t n = strspn(start + 1, "0123456789");
    const char *q = start + 1 + n;

    if (n == 0 || n > 4)
        return refuse(start, 4, err);
    if (*q == ',') {
        n = strspn(q + 1, "0123456789");
        q += 1 + n;
    }
    if (n > 4 || *q != '}' || q[1] == '+' || q[1] == '?')
        return refuse(start, (size_t)(q - start) + 2, err);
    *p = q + 1;
    return 0;
}

int pretokenizer_pattern_check(const char *pattern, struct err *err)
{
    const char *p = pattern;
    int rc = 0;

    while (rc == 0 && *p != '\0') {
        if (*p == '\\')
            rc = check_escape(&p, err);
        else if (*p == '[')
            rc = check_class(&p, err);
        else if (*p == '(')
            rc = check_group(&p, err);
        else if (*p == '{')
            rc = check_counts(&p, err);
        else if (*p == '^' || *p == '$') /* of a line in Ruby, of the text in PCRE2 */
            rc = refuse(p, 1, err);
        else
            p++;
    }
    return rc;
}
