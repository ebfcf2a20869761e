#include "server/http_listen.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define BACKLOG 1024

static int split(const char *listen, char *host, size_t host_size, char *port, size_t port_size)
{
    const char *colon = strrchr(listen, ':');
    if (!colon || strlen(colon + 1) == 0 || strlen(colon + 1) >= port_size)
        return -1;
    memcpy(port, colon + 1, strlen(colon + 1) + 1);
    if (port[strspn(port, "0123456789")] || atoi(port) > 65535)
        return -1;
    const char *from = listen, *to = colon;
    if (from[0] == '[') {
        if (to[-1] != ']')
            return -1;
        from++;
        to--;
    } else if (memchr(from, ':', (size_t)(to - from))) {
        return -1; /* an IPv6 address needs brackets */
    }
    if ((size_t)(to - from) >= host_size)
        return -1;
    memcpy(host, from, (size_t)(to - from));
    host[to - from] = '\0';
    if (strcmp(host, "*") == 0)
        host[0] = '\0';
    return 0;
}

static bool is_loopback(const struct sockaddr *address)
{
    if (address->sa_family == AF_INET) {
        const struct sockaddr_in *in = (const struct sockaddr_in *)(const void *)address;
        return ntohl(in->sin_addr.s_addr) >> 24 == 127;
    }
    const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)(const void *)address;
    return address->sa_family == AF_INET6 &&
           (IN6_IS_ADDR_LOOPBACK(&in6->sin6_addr) ||
            (IN6_IS_ADDR_V4MAPPED(&in6->sin6_addr) && in6->sin6_addr.s6_addr[12] == 127));
}

static int bind_to(const struct addrinfo *address)
{
    int fd = socket(address->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    int one = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
    if (bind(fd, address->ai_addr, address->ai_addrlen) < 0 || listen(fd, BACKLOG) < 0) {
        int saved = errno;
        close(fd);
        errno = saved;
        return -1;
    }
    return fd;
}

static int describe(struct http_listen *out, struct err *err)
{
    struct sockaddr_storage address;
    socklen_t len = sizeof(address);
    char host[48], port[8];
    if (getsockname(out->fd, (struct sockaddr *)&address, &len) < 0)
        return err_set_errno(err, errno, "listening socket");
    if (getnameinfo((struct sockaddr *)&address, len, host, sizeof(host), port, sizeof(port),
                    NI_NUMERICHOST | NI_NUMERICSERV) != 0)
        return err_set(err, ERR_IO, "listening socket: no address");
    snprintf(out->host, sizeof(out->host), address.ss_family == AF_INET6 ? "[%s]" : "%s", host);
    out->port = atoi(port);
    return 0;
}

int http_listen_open(struct http_listen *out, const char *listen, bool loopback_only,
                     struct err *err)
{
    char host[256], port[8];
    *out = (struct http_listen){.fd = -1};
    if (split(listen, host, sizeof(host), port, sizeof(port)) < 0)
        return err_set(err, ERR_INVALID,
                       "--listen \"%s\": give HOST:PORT, e.g. 127.0.0.1:8080 or "
                       "[::1]:8080",
                       listen);
    struct addrinfo hints = {.ai_family = AF_UNSPEC,
                             .ai_socktype = SOCK_STREAM,
                             .ai_flags = AI_PASSIVE | AI_NUMERICSERV};
    struct addrinfo *found = NULL;
    int rc = getaddrinfo(host[0] ? host : NULL, port, &hints, &found);
    if (rc != 0)
        return err_set(err, ERR_INVALID, "--listen \"%s\": %s", listen, gai_strerror(rc));
    const struct addrinfo *address = found;
    /* With no host the first address may be IPv4's any, the second IPv6's, which serves both. */
    for (const struct addrinfo *a = found; a && !host[0]; a = a->ai_next)
        if (a->ai_family == AF_INET6)
            address = a;
    out->loopback = is_loopback(address->ai_addr);
    if (loopback_only && !out->loopback) {
        err_set(
            err, ERR_INVALID,
            "--listen \"%s\" is reachable from other machines: give --tls-cert and --tls-key, or "
            "--insecure if API keys and data may travel unencrypted",
            listen);
    } else {
        out->fd = bind_to(address);
        if (out->fd < 0 && address != found) { /* no IPv6 here */
            out->fd = bind_to(found);
        }
        if (out->fd < 0)
            err_set_errno(err, errno, "can not listen on %s", listen);
    }
    freeaddrinfo(found);
    if (out->fd < 0)
        return -1;
    if (describe(out, err) < 0) {
        close(out->fd);
        out->fd = -1;
        return -1;
    }
    return 0;
}
