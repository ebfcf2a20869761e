#include "engine/chat_template.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/base/strbuf.h"
#include "engine/chat_template_form.h"

struct chat_template {
    const struct tokenizer *tokenizer;
    char *system; /* text of the system turn that goes in front; NULL: none */
    int32_t start, end;
};

/* The two control tokens of ChatML, as the tokenizer has them. */
static int find_tokens(struct chat_template *chat, struct err *err)
{
    chat->start = tokenizer_added_token(chat->tokenizer, "<|im_start|>");
    chat->end = tokenizer_added_token(chat->tokenizer, "<|im_end|>");
    if (chat->start < 0 || chat->end < 0 || !tokenizer_is_special(chat->tokenizer, chat->start) ||
        !tokenizer_is_special(chat->tokenizer, chat->end))
        return err_set(err, ERR_INVALID,
                       "the chat template is ChatML, but the tokenizer has no special tokens "
                       "<|im_start|> and <|im_end|>");
    return 0;
}

int chat_template_open(struct chat_template **out, const char *text, size_t len,
                       const struct tokenizer *tokenizer, struct err *err)
{
    struct chat_template *chat;

    if (text == NULL && (tokenizer_added_token(tokenizer, "<|im_start|>") < 0 ||
                         tokenizer_added_token(tokenizer, "<|im_end|>") < 0))
        return err_set(
            err, ERR_INVALID,
            "the model has no chat template, and its tokenizer no ChatML tokens; a model "
            "that was tuned for chat is needed");
    chat = calloc(1, sizeof *chat);
    if (chat == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    chat->tokenizer = tokenizer;
    if ((text != NULL && chat_template_form_match(text, len, &chat->system, err) != 0) ||
        find_tokens(chat, err) != 0) {
        chat_template_free(chat);
        return -1;
    }
    *out = chat;
    return 0;
}

void chat_template_free(struct chat_template *chat)
{
    if (chat == NULL)
        return;
    free(chat->system);
    free(chat);
}

void chat_tokens_init(struct chat_tokens *tokens)
{
    *tokens = (struct chat_tokens){0};
}

void chat_tokens_reset(struct chat_tokens *tokens)
{
    tokens->count = 0;
}

void chat_tokens_release(struct chat_tokens *tokens)
{
    free(tokens->ids);
    free(tokens->message);
    free(tokens->answer);
    *tokens = (struct chat_tokens){0};
}

static int reserve(struct chat_tokens *tokens, struct err *err)
{
    size_t capacity = tokens->capacity ? tokens->capacity * 2 : 256;
    int32_t *ids, *message;
    bool *answer;

    if (tokens->count < tokens->capacity)
        return 0;
    ids = reallocarray(tokens->ids, capacity, sizeof *ids);
    if (ids != NULL)
        tokens->ids = ids;
    message = reallocarray(tokens->message, capacity, sizeof *message);
    if (message != NULL)
        tokens->message = message;
    answer = reallocarray(tokens->answer, capacity, sizeof *answer);
    if (answer != NULL)
        tokens->answer = answer;
    if (ids == NULL || message == NULL || answer == NULL)
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    tokens->capacity = capacity;
    return 0;
}

static int add(struct chat_tokens *tokens, int32_t id, int32_t message, bool answer,
               struct err *err)
{
    if (reserve(tokens, err) != 0)
        return -1;
    tokens->ids[tokens->count] = id;
    tokens->message[tokens->count] = message;
    tokens->answer[tokens->count++] = answer;
    return 0;
}

/* Working memory of one call. */
struct rendering {
    const struct chat_template *chat;
    struct chat_tokens *out;
    struct strbuf text;
    struct token_list list;
};

/* What is in r->text, as plain text: names of special tokens in it stay text. Bytes from
 * `answer_from` on are the answer's. */
static int add_text(struct rendering *r, int32_t message, size_t answer_from, struct err *err)
{
    if (strbuf_failed(&r->text))
        return err_set(err, ERR_NO_MEMORY, "out of memory");
    r->list.count = 0;
    if (tokenizer_encode(r->chat->tokenizer, r->text.data, r->text.len, false, &r->list, err) != 0)
        return -1;
    for (size_t i = 0; i < r->list.count; i++) {
        if (add(r->out, r->list.ids[i], message, r->list.starts[i] >= answer_from, err) != 0)
            return -1;
    }
    return 0;
}

/* Role and content are tokenized as one text, as they are when a whole conversation is. */
static int add_turn(struct rendering *r, const char *role, const char *content, int32_t message,
                    struct err *err)
{
    bool answer = message >= 0 && strcmp(role, "assistant") == 0;
    size_t content_at;

    strbuf_reset(&r->text);
    strbuf_addstr(&r->text, role);
    strbuf_addch(&r->text, '\n');
    content_at = r->text.len;
    strbuf_addstr(&r->text, content);
    if (add(r->out, r->chat->start, message, false, err) != 0 ||
        add_text(r, message, answer ? content_at : SIZE_MAX, err) != 0 ||
        add(r->out, r->chat->end, message, answer, err) != 0)
        return -1;
    strbuf_reset(&r->text);
    strbuf_addch(&r->text, '\n');
    return add_text(r, message, SIZE_MAX, err);
}

/* Models know the older or newer name of a role, not both. */
static const char *role_of(const struct engine_message *message)
{
    if (strcmp(message->role, "developer") == 0)
        return "system";
    return strcmp(message->role, "function") == 0 ? "tool" : message->role;
}

static int add_conversation(struct rendering *r, const struct engine_message *messages,
                            int32_t count, bool add_generation_prompt, struct err *err)
{
    if (r->chat->system != NULL && count > 0 && strcmp(role_of(&messages[0]), "system") != 0 &&
        add_turn(r, "system", r->chat->system, -1, err) != 0)
        return -1;
    for (int32_t i = 0; i < count; i++) {
        if (add_turn(r, role_of(&messages[i]), messages[i].content, i, err) != 0)
            return err_prefix(err, "message %d", i + 1);
    }
    if (!add_generation_prompt)
        return 0;
    strbuf_reset(&r->text);
    strbuf_addstr(&r->text, "assistant\n");
    if (add(r->out, r->chat->start, -1, false, err) != 0)
        return -1;
    return add_text(r, -1, SIZE_MAX, err);
}

int chat_template_encode(const struct chat_template *chat, const struct engine_message *messages,
                         int32_t count, bool add_generation_prompt, struct chat_tokens *out,
                         struct err *err)
{
    struct rendering r = {.chat = chat, .out = out};
    size_t before = out->count;
    int rc;

    strbuf_init(&r.text, (size_t)1 << 31);
    token_list_init(&r.list);
    rc = add_conversation(&r, messages, count, add_generation_prompt, err);
    if (rc != 0)
        out->count = before;
    token_list_release(&r.list);
    strbuf_release(&r.text);
    return rc;
}

bool chat_template_is_end(const struct chat_template *chat, int32_t id)
{
    return id == chat->end;
}
