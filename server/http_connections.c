#include "server/http_connections.h"

#include <netdb.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "server/http_internal.h"

int http_connections_init(struct http_connections *connections, int64_t limit)
{
    memset(connections, 0, sizeof(*connections));
    connections->limit = limit;
    return pthread_mutex_init(&connections->lock, NULL) == 0 ? 0 : -1;
}

void http_connections_release(struct http_connections *connections)
{
    pthread_mutex_destroy(&connections->lock);
}

/* The peer's address without its port. */
static void read_remote(int fd, char *out, size_t size)
{
    struct sockaddr_storage address;
    socklen_t len = sizeof(address);
    if (getpeername(fd, (struct sockaddr *)&address, &len) < 0 ||
        getnameinfo((struct sockaddr *)&address, len, out, (socklen_t)size, NULL, 0,
                    NI_NUMERICHOST) != 0)
        memcpy(out, "?", 2);
}

struct http_connection *http_connections_add(struct http_connections *connections, int fd,
                                             int64_t deadline)
{
    struct http_connection *connection = calloc(1, sizeof(*connection));
    if (!connection)
        return NULL;
    connection->fd = fd;
    connection->opened = http_now_ms();
    atomic_init(&connection->deadline, deadline);
    atomic_init(&connection->between, true);
    read_remote(fd, connection->remote, sizeof(connection->remote));
    pthread_mutex_lock(&connections->lock);
    connection->next = connections->first;
    if (connections->first)
        connections->first->prev = connection;
    connections->first = connection;
    connections->count++;
    pthread_mutex_unlock(&connections->lock);
    return connection;
}

void http_connections_remove(struct http_connections *connections,
                             struct http_connection *connection)
{
    pthread_mutex_lock(&connections->lock);
    if (connection->prev)
        connection->prev->next = connection->next;
    else
        connections->first = connection->next;
    if (connection->next)
        connection->next->prev = connection->prev;
    connections->count--;
    pthread_mutex_unlock(&connections->lock);
    free(connection);
}

static void cut(struct http_connections *connections, struct http_connection *connection)
{
    shutdown(connection->fd, SHUT_RDWR);
    atomic_store(&connection->deadline, HTTP_NO_DEADLINE);
    atomic_fetch_add(&connections->cut, 1);
}

bool http_connection_gone(const struct http_connection *connection)
{
    struct pollfd fd = {.fd = connection->fd, .events = POLLRDHUP};
    return poll(&fd, 1, 0) > 0 && (fd.revents & (POLLRDHUP | POLLHUP | POLLERR)) != 0;
}

/* MHD 0.9.75 overlooks an end that comes together with the last bytes: it reads these, and waits
 * for an event that has been. To shut down the half that the client has closed makes another one.
 */
static void wake_reader(struct http_connection *connection)
{
    if (atomic_load(&connection->reading) && http_connection_gone(connection))
        shutdown(connection->fd, SHUT_RD);
}

/* A quarter of a second old at least: a client that has just connected gets its chance. */
#define CROWD_AGE_MS 250

void http_connections_sweep(struct http_connections *connections, int64_t now)
{
    pthread_mutex_lock(&connections->lock);
    int64_t crowd = connections->count - connections->limit * 9 / 10;
    struct http_connection *oldest = NULL;
    for (struct http_connection *c = connections->first; c; c = c->next) {
        if (atomic_load(&c->deadline) <= now)
            cut(connections, c);
        else
            wake_reader(c);
        oldest = c;
    }
    /* New ones are put in front, so the oldest are at the end. */
    for (struct http_connection *c = oldest; c && crowd > 0; c = c->prev) {
        if (!atomic_load(&c->between) || now - c->opened < CROWD_AGE_MS ||
            atomic_load(&c->deadline) == HTTP_NO_DEADLINE)
            continue;
        cut(connections, c);
        crowd--;
    }
    pthread_mutex_unlock(&connections->lock);
}

int64_t http_connections_count(struct http_connections *connections)
{
    pthread_mutex_lock(&connections->lock);
    int64_t count = connections->count;
    pthread_mutex_unlock(&connections->lock);
    return count;
}
