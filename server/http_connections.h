/* http_connections.h: the registry of client connections and the deadlines that libmicrohttpd does
 * not have.
 *
 * MHD's own timeout is one of inactivity: a client that sends a byte now and then is never timed
 * out, and at its connection limit MHD stops accepting without a word. So each connection carries a
 * deadline, and the clock thread shuts down the sockets of those that passed it; MHD then sees the
 * end of the stream and cleans up. When nine tenths of the limit are in use, connections without a
 * request under way go first, the oldest first. And the clock wakes MHD where a client has gone in
 * the middle of a body and MHD did not see it. */
#ifndef GRAFT_HTTP_CONNECTIONS_H
#define GRAFT_HTTP_CONNECTIONS_H

#include <stdbool.h>
#include <stdint.h>

struct http_connection;
struct http_connections;

int http_connections_init(struct http_connections *connections, int64_t limit);
void http_connections_release(struct http_connections *connections);

/* `fd` stays MHD's. NULL: out of memory. */
struct http_connection *http_connections_add(struct http_connections *connections, int fd,
                                             int64_t deadline);
/* Before MHD closes the socket: afterwards the clock does not touch that descriptor. */
void http_connections_remove(struct http_connections *connections,
                             struct http_connection *connection);
/* Has the client closed its end? While the connection is in the registry. */
bool http_connection_gone(const struct http_connection *connection);
/* One round of the clock. */
void http_connections_sweep(struct http_connections *connections, int64_t now);
int64_t http_connections_count(struct http_connections *connections);

#endif
