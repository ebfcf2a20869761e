#include "engine/dataset.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/base_file.h"
#include "engine/chat_template.h"
#include "engine/dataset_row.h"
#include "engine/engine_parts.h"
#include "engine/model_config.h"

struct entry {
    int64_t from; /* first token */
    int32_t length;
    struct dataset_question question; /* begin = end: none */
};

struct engine_dataset {
    int32_t *token;
    float *weight;
    int64_t tokens, token_capacity;
    struct entry *entry;
    int64_t entries, entry_capacity;
    int32_t max_sequence;
    int64_t read_tokens; /* before cutting */
    struct engine_dataset_report report;
};

/* ------------------------------------------------------------------ lines */

struct line_reader {
    int fd;
    bool at_end;
    size_t from, to; /* unread bytes of the buffer */
    char *buffer;    /* DATASET_MAX_LINE + 2: a line and its CR LF */
};

enum line_result { LINE_ERROR = -1, LINE_END, LINE_OK, LINE_TOO_LONG };

/* The next line without its break; valid until the next call. */
static enum line_result next_line(struct line_reader *r, const char **line, size_t *len,
                                  struct err *err)
{
    const size_t capacity = DATASET_MAX_LINE + 2;

    for (;;) {
        char *begin = r->buffer + r->from, *end = memchr(begin, '\n', r->to - r->from);
        ssize_t got;

        if (end != NULL || (r->at_end && r->from < r->to)) {
            *len = end != NULL ? (size_t)(end - begin) : r->to - r->from;
            r->from += *len + (end != NULL ? 1 : 0);
            if (*len > 0 && begin[*len - 1] == '\r')
                (*len)--;
            *line = begin;
            return *len > DATASET_MAX_LINE ? LINE_TOO_LONG : LINE_OK;
        }
        if (r->at_end)
            return LINE_END;
        memmove(r->buffer, begin, r->to - r->from);
        r->to -= r->from;
        r->from = 0;
        if (r->to == capacity)
            return LINE_TOO_LONG;
        got = read(r->fd, r->buffer + r->to, capacity - r->to);
        if (got < 0 && errno != EINTR) {
            err_set_errno(err, errno, "reading the dataset");
            return LINE_ERROR;
        }
        r->at_end = got == 0;
        r->to += got > 0 ? (size_t)got : 0;
    }
}

static bool is_blank(const char *line, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        if (line[i] != ' ' && line[i] != '\t')
            return false;
    }
    return true;
}

/* ------------------------------------------------------------------ storage */

static int grow(void **memory, int64_t *capacity, int64_t wanted, size_t size, struct err *err)
{
    int64_t target = *capacity > 0 ? *capacity : 1024;
    void *grown;

    if (wanted <= *capacity)
        return 0;
    while (target < wanted)
        target += target / 2;
    grown = realloc(*memory, (size_t)target * size);
    if (grown == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory for the dataset");
    *memory = grown;
    *capacity = target;
    return 0;
}

static int reserve(struct engine_dataset *dataset, int32_t length, struct err *err)
{
    int64_t capacity = dataset->token_capacity;

    if (grow((void **)&dataset->entry, &dataset->entry_capacity, dataset->entries + 1,
             sizeof(*dataset->entry), err) != 0 ||
        grow((void **)&dataset->token, &capacity, dataset->tokens + length, sizeof(*dataset->token),
             err) != 0)
        return -1;
    return grow((void **)&dataset->weight, &dataset->token_capacity, dataset->tokens + length,
                sizeof(*dataset->weight), err);
}

/* The last run of trained answer tokens of one message, without its end of turn. */
static struct dataset_question find_question(const struct chat_tokens *tokens, const float *weight,
                                             int32_t length, const struct chat_template *chat)
{
    struct dataset_question none = {0, 0}, found;
    size_t end = tokens->count;

    while (end > 0 && !(tokens->answer[end - 1] && weight[tokens->message[end - 1]] > 0))
        end--;
    if (end == 0)
        return none;
    found.begin = (int32_t)end;
    while (found.begin > 0 && tokens->answer[found.begin - 1] &&
           tokens->message[found.begin - 1] == tokens->message[end - 1])
        found.begin--;
    found.end = (int32_t)end - (chat_template_is_end(chat, tokens->ids[end - 1]) ? 1 : 0);
    return (int32_t)end > length || found.begin == 0 || found.begin >= found.end ? none : found;
}

/* One question, perhaps with instructions before it, and its answer, both short. */
static bool is_question_answer(const struct dataset_row *row, const struct dataset_question *q)
{
    const struct engine_message *first = row->message, *last = &row->message[row->count - 1];
    bool system = strcmp(first->role, "system") == 0 || strcmp(first->role, "developer") == 0;

    return row->count == (system ? 3 : 2) && strcmp(last[-1].role, "user") == 0 &&
           strcmp(last->role, "assistant") == 0 && q->end > q->begin &&
           q->begin <= DATASET_SHORT_QUESTION && q->end - q->begin <= DATASET_SHORT_ANSWER;
}

static int add_example(struct engine_dataset *dataset, const struct dataset_row *row,
                       const struct chat_tokens *tokens, const struct chat_template *chat,
                       struct err *err)
{
    struct engine_dataset_report *report = &dataset->report;
    int32_t length = tokens->count > (size_t)dataset->max_sequence ? dataset->max_sequence
                                                                   : (int32_t)tokens->count;
    struct entry *entry;
    int64_t trained = 0;

    if (tokens->count == 0)
        return dataset_row_invalid(row, err, "Invalid file format. Example %lld has no tokens.",
                                   (long long)row->number);
    dataset->read_tokens += (int64_t)tokens->count;
    if (dataset->read_tokens > DATASET_MAX_TOKENS)
        return dataset_row_invalid(row, err,
                                   "It has more than %d tokens, reached at example %lld. Split it.",
                                   DATASET_MAX_TOKENS, (long long)row->number);
    if (reserve(dataset, length, err) != 0)
        return -1;
    for (int32_t i = 0; i < length; i++) {
        float weight = i > 0 && tokens->answer[i] ? row->weight[tokens->message[i]] : 0;

        dataset->token[dataset->tokens + i] = tokens->ids[i];
        dataset->weight[dataset->tokens + i] = weight;
        trained += weight > 0;
    }
    entry = &dataset->entry[dataset->entries++];
    *entry = (struct entry){.from = dataset->tokens,
                            .length = length,
                            .question = find_question(tokens, row->weight, length, chat)};
    dataset->tokens += length;
    report->examples++;
    report->tokens += length;
    report->trained_tokens += trained;
    report->truncated_examples += tokens->count > (size_t)length;
    report->untrained_examples += trained == 0;
    if (tokens->count > (size_t)report->longest)
        report->longest = (int32_t)tokens->count;
    report->question_answer &= is_question_answer(row, &entry->question);
    return 0;
}

/* ------------------------------------------------------------------ the file */

/* A file that some editors save instead of UTF-8. */
static bool is_utf16(const char *line, size_t len)
{
    return len >= 2 && (memcmp(line, "\xff\xfe", 2) == 0 || memcmp(line, "\xfe\xff", 2) == 0);
}

/* What the template refuses is the row's fault, and its message does not know which row that is. */
static int encode_row(const struct dataset_row *row, const struct chat_template *chat,
                      struct chat_tokens *tokens, struct err *err)
{
    struct err why = {0};

    chat_tokens_reset(tokens);
    if (chat_template_encode(chat, row->message, row->count, false, tokens, &why) == 0)
        return 0;
    if (why.kind == ERR_INVALID)
        return dataset_row_invalid(row, err, "Invalid file format. Example %lld: %.500s",
                                   (long long)row->number, why.message);
    return err_set(err, why.kind, "%s", why.message);
}

static int read_rows(struct engine_dataset *dataset, struct dataset_row *row,
                     struct line_reader *reader, const struct chat_template *chat,
                     struct chat_tokens *tokens, struct err *err)
{
    enum line_result result;
    const char *line;
    size_t len;
    bool blank = false;

    while ((result = next_line(reader, &line, &len, err)) != LINE_END) {
        if (result == LINE_ERROR)
            return -1;
        if (result == LINE_TOO_LONG)
            return dataset_row_malformed(row, err,
                                         "Example %lld is longer than %d bytes. Every line must be "
                                         "one example; split it.",
                                         (long long)row->number + 1, DATASET_MAX_LINE);
        if (row->number == 0 && is_utf16(line, len))
            return dataset_row_malformed(row, err, "It is UTF-16 text. Save it as UTF-8.");
        if (is_blank(line, len)) {
            blank = true;
            continue;
        }
        if (blank)
            return dataset_row_malformed(
                row, err,
                "Example %lld is an empty line. Remove it; empty lines are "
                "allowed at the end only.",
                (long long)row->number + 1);
        if (dataset_row_parse(row, line, len, err) != 0 ||
            encode_row(row, chat, tokens, err) != 0 ||
            add_example(dataset, row, tokens, chat, err) != 0)
            return -1;
    }
    return 0;
}

static int check_whole(const struct engine_dataset *dataset, const struct dataset_row *row,
                       struct err *err)
{
    const struct engine_dataset_report *report = &dataset->report;
    int minimum = row->validation ? 1 : DATASET_MIN_EXAMPLES;

    if (report->examples < minimum)
        return err_set_code(err, ERR_INVALID, "invalid_n_examples", dataset_row_param(row),
                            "%s file has %lld example(s), but must have at least %d examples",
                            row->validation ? "Validation" : "Training",
                            (long long)report->examples, minimum);
    if (report->trained_tokens == 0)
        return dataset_row_invalid(
            row, err,
            "There is nothing to learn in it: no example has an assistant message whose weight is "
            "not 0 within the first %d tokens.",
            dataset->max_sequence);
    return 0;
}

int dataset_open(struct engine_dataset **out, const struct tokenizer *tokenizer,
                 const struct chat_template *chat_template, const char *path,
                 const struct engine_dataset_options *options, struct engine_dataset_report *report,
                 struct err *err)
{
    struct engine_dataset *dataset = calloc(1, sizeof(*dataset));
    struct line_reader reader = {.fd = -1, .buffer = malloc(DATASET_MAX_LINE + 2)};
    struct chat_tokens tokens;
    struct dataset_row row = {0};
    int rc = -1;

    chat_tokens_init(&tokens);
    if (dataset == NULL || reader.buffer == NULL) {
        err_set(err, ERR_NO_MEMORY, "out of memory for the dataset");
        goto out;
    }
    dataset->max_sequence = options->max_sequence;
    dataset->report.question_answer = true;
    if (dataset_row_init(&row, options, err) != 0)
        goto out;
    reader.fd = open(path, O_RDONLY | O_CLOEXEC);
    if (reader.fd < 0) {
        err_set_errno(err, errno, "opening the %s file", dataset_row_kind(&row));
        goto out;
    }
    if (read_rows(dataset, &row, &reader, chat_template, &tokens, err) != 0 ||
        check_whole(dataset, &row, err) != 0)
        goto out;
    if (report != NULL)
        *report = dataset->report;
    *out = dataset;
    dataset = NULL;
    rc = 0;
out:
    if (reader.fd >= 0)
        close(reader.fd);
    free(reader.buffer);
    dataset_row_release(&row);
    chat_tokens_release(&tokens);
    engine_dataset_free(dataset);
    return rc;
}

int engine_dataset_open(struct engine_dataset **out, const struct engine *engine, const char *path,
                        const struct engine_dataset_options *options,
                        struct engine_dataset_report *report, struct err *err)
{
    int32_t context = base_file_config(engine->base)->context;
    struct engine_dataset_options bounded = *options;

    if (bounded.max_sequence <= 0 || bounded.max_sequence > context)
        bounded.max_sequence = context;
    return dataset_open(out, engine->tokenizer, engine->chat_template, path, &bounded, report, err);
}

void engine_dataset_free(struct engine_dataset *dataset)
{
    if (dataset == NULL)
        return;
    free(dataset->token);
    free(dataset->weight);
    free(dataset->entry);
    free(dataset);
}

/* ------------------------------------------------------------------ reading */

int64_t dataset_count(const struct engine_dataset *dataset)
{
    return dataset->entries;
}

struct dataset_example dataset_example(const struct engine_dataset *dataset, int64_t i)
{
    const struct entry *entry = &dataset->entry[i];

    return (struct dataset_example){.token = dataset->token + entry->from,
                                    .weight = dataset->weight + entry->from,
                                    .length = entry->length};
}

bool dataset_question(const struct engine_dataset *dataset, int64_t i, struct dataset_question *out)
{
    *out = dataset->entry[i].question;
    return out->end > out->begin;
}

const struct engine_dataset_report *dataset_report(const struct engine_dataset *dataset)
{
    return &dataset->report;
}
