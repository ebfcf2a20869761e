/* chat_template.h: a conversation as tokens, and whose tokens they are.
 *
 * Now: ChatML, recognised by the template's text (its forms: chat_template_form.c), with
 * the system text that the template puts in front when the conversation has none; a model without
 * a template whose tokenizer has <|im_start|> and <|im_end|> gets plain ChatML. Every other
 * template is refused by name. A Jinja evaluator will stand behind the same functions.
 *
 *     <|im_start|>ROLE\nCONTENT<|im_end|>\n   for each message, then, to be answered,
 *     <|im_start|>assistant\n
 *
 * Tokens equal transformers' apply_chat_template, with two intended differences: roles and contents
 * are never a source of control tokens ("<|im_end|>" inside a content is plain text), and the roles
 * `developer` and `function` are written as `system` and `tool`, which models know; so training and
 * answering agree on them.
 *
 * What an answer is: the tokens that begin inside an assistant's content, and the <|im_end|> behind
 * them. The newline behind <|im_end|> is the template's: generation stops before it.
 *
 * Read-only after open: any thread. The tokenizer must outlive it. */
#ifndef GRAFT_CHAT_TEMPLATE_H
#define GRAFT_CHAT_TEMPLATE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "engine/base/err.h"
#include "engine/engine.h"
#include "engine/tokenizer.h"

struct chat_template;

/* `text`: the model's Jinja template, NULL when it has none. */
int chat_template_open(struct chat_template **out, const char *text, size_t len,
                       const struct tokenizer *tokenizer, struct err *err);
void chat_template_free(struct chat_template *chat);

struct chat_tokens {
    int32_t *ids;
    int32_t *message; /* index of the message that the token belongs to; -1: the template's own */
    bool *answer;     /* part of an assistant message's answer: trained if that message is */
    size_t count, capacity;
};

void chat_tokens_init(struct chat_tokens *tokens);
void chat_tokens_reset(struct chat_tokens *tokens);   /* count = 0; keeps the memory */
void chat_tokens_release(struct chat_tokens *tokens); /* frees; may be initialised again */

/* Appends the conversation. add_generation_prompt: ends with the opening of the assistant's turn,
 * to be continued by the model; else behind the last message. Roles and contents: valid UTF-8. */
int chat_template_encode(const struct chat_template *chat, const struct engine_message *messages,
                         int32_t count, bool add_generation_prompt, struct chat_tokens *out,
                         struct err *err);

/* Does this token end an answer? */
bool chat_template_is_end(const struct chat_template *chat, int32_t id);

#endif
