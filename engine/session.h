/* session.h: the continuous batch, as the engine's own modules use it beside engine.h.
 *
 * A step is one pass of the model over a batch of documents: the next token of every sequence that
 * is answering, and for sequences still reading their prompt one chunk each, as long as
 * SESSION_PREFILL_ROWS allows, first come first served. Chunks are the intervals
 * [k·SESSION_CHUNK, (k+1)·SESSION_CHUNK) of absolute positions: where a prompt is cut never depends
 * on what else runs. Rows of one fine-tune lie together: one segment, for a backend that reads its
 * bits once for all of them (the CPU's goes through them for each row).
 *
 * A sequence holds a slot of the kv cache from its first step to its end; those without one wait in
 * the order they came. A step allocates nothing. An event may submit and cancel. */
#ifndef GRAFT_SESSION_H
#define GRAFT_SESSION_H

#include "engine/engine.h"
#include "engine/model.h"

#define SESSION_CHUNK 64
#define SESSION_PREFILL_ROWS 256
#define SESSION_DEFAULT_SEQUENCES 16
#define SESSION_MAX_SEQUENCES 1024
#define SESSION_DEFAULT_CONTEXT 4096

/* engine_session_open on other weights than the base's (a trainer's); NULL: the base's. They must
 * outlive the session and may not change between its steps. */
int session_open(struct engine_session **out, struct engine *engine,
                 const struct engine_session_options *options, const struct model_weights *weights,
                 struct err *err);

/* engine_session_submit with a prompt of token[count] in place of request->messages. */
int session_submit_tokens(struct engine_session *session, const int32_t *token, size_t count,
                          const struct engine_request *request, uint64_t *id, struct err *err);

#endif
