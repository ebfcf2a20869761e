/* Worker protocol: any bytes are frames, or refused, without a read outside; and a frame that is
 * taken has strings that end. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "server/ipc.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static volatile size_t sink;

static void touch(const struct ipc_message *m)
{
    switch (m->type) {
    case IPC_SUBMIT:
        sink += strlen(m->submit.tenant) + strlen(m->submit.base_path) +
                strlen(m->submit.delta_sha256) + strlen(m->submit.delta_path);
        for (int32_t i = 0; i < m->submit.message_count; i++)
            sink += strlen(m->submit.messages[i].role) + strlen(m->submit.messages[i].content);
        for (int32_t i = 0; i < m->submit.stop_count; i++)
            sink += strlen(m->submit.stop[i]);
        return;
    case IPC_TEXT:
        for (size_t i = 0; i < m->text.len; i++)
            sink += (unsigned char)m->text.text[i];
        return;
    case IPC_ERROR:
        sink += strlen(m->error.message);
        return;
    default:
        return;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    size_t at = 0, used = 0;
    struct ipc_message m;
    struct err err = {0};

    while (ipc_take((const char *)data + at, size - at, &used, &m, &err) == 1) {
        touch(&m);
        ipc_message_release(&m);
        at += used;
    }
    return 0;
}
