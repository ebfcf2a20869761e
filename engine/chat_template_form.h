/* chat_template_form.h: is this Jinja text one of the known forms of ChatML?
 *
 * Compared are the tokens of the Jinja language, not the letters: white space inside tags, the kind
 * of quotes, message.role for message['role'], and literals cut into a sum make no difference. */
#ifndef GRAFT_CHAT_TEMPLATE_FORM_H
#define GRAFT_CHAT_TEMPLATE_FORM_H

#include <stddef.h>

#include "engine/base/err.h"

/* *system: the system text the template puts in front of a conversation that has none, malloc'ed;
 * NULL when it puts none. ERR_INVALID for any other template. */
int chat_template_form_match(const char *text, size_t len, char **system, struct err *err);

#endif
