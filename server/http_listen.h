/* http_listen.h: the listening socket, and whether it is for this machine alone. */
#ifndef GRAFT_HTTP_LISTEN_H
#define GRAFT_HTTP_LISTEN_H

#include <stdbool.h>
#include <stddef.h>

#include "engine/base/err.h"

struct http_listen {
    int fd;
    bool loopback; /* 127.0.0.0/8 or ::1 */
    char host[64]; /* as bound, numeric, IPv6 in brackets */
    int port;
};

/* `listen`: HOST:PORT, [IPV6]:PORT; HOST empty or "*": every address. Port 0: a free one. With
 * loopback_only an address beyond loopback is ERR_INVALID before anything is bound. */
int http_listen_open(struct http_listen *out, const char *listen, bool loopback_only,
                     struct err *err);

#endif
