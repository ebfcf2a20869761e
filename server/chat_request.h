/* chat_request.h: the body of POST /v1/chat/completions as a struct.
 *
 * Which fields are honoured, accepted without effect or refused stands in field_table.c
 * (field_table_chat); types and bounds are held here. Strings point into the JSON, but for contents
 * that were joined from text parts. */
#ifndef GRAFT_CHAT_REQUEST_H
#define GRAFT_CHAT_REQUEST_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "engine/base/err.h"
#include "engine/engine.h"
#include "server/ipc.h"

struct chat_request {
    const char *model;
    struct engine_message *messages;
    int32_t message_count;
    double temperature, top_p;
    bool has_seed;
    uint64_t seed;
    int32_t max_tokens; /* 0: up to the context */
    const char *stop[IPC_STOP_MAX];
    int32_t stop_count;
    bool stream, include_usage;
    char **joined; /* contents made of several parts */
    int32_t joined_count;
};

/* `json` is an object and outlives the request. */
int chat_request_parse(struct chat_request *request, const json_t *json, struct err *err);
void chat_request_release(struct chat_request *request);

#endif
