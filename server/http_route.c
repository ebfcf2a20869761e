#include "server/http_route.h"

#include <stdio.h>
#include <string.h>

#include "server/http_path.h"
#include "server/http_request.h"

/* Matches one pattern; *literals counts the segments that matched literally. */
static bool match(const struct http_route *route, const struct http_path *path, const char **params,
                  int *literals)
{
    const char *p = route->pattern;
    int param_count = 0;
    *literals = 0;
    for (int i = 0; i < path->segment_count; i++) {
        if (*p != '/')
            return false;
        p++;
        size_t n = strcspn(p, "/");
        if (p[0] == '{') {
            if (path->segments[i][0] == '\0' || (path->slash[i] && !route->slash_in_param))
                return false;
            params[param_count++] = path->segments[i];
        } else {
            if (strlen(path->segments[i]) != n || memcmp(path->segments[i], p, n) != 0)
                return false;
            ++*literals;
        }
        p += n;
    }
    return *p == '\0';
}

static void add_method(char allow[64], const char *method)
{
    size_t len = strlen(allow);
    snprintf(allow + len, 64 - len, "%s%s", len ? ", " : "", method);
    if (strcmp(method, "GET") == 0)
        add_method(allow, "HEAD");
}

const struct http_route *http_route_find(const struct http_route *routes, size_t count,
                                         const char *method, const struct http_path *path,
                                         const char **params, char allow[64])
{
    const struct http_route *best = NULL;
    int best_literals = -1;
    allow[0] = '\0';
    if (strcmp(method, "HEAD") == 0)
        method = "GET";
    for (size_t i = 0; i < count; i++) {
        const char *found[HTTP_PATH_PARAMS_MAX] = {NULL};
        int literals;
        if (!match(&routes[i], path, found, &literals))
            continue;
        if (!strstr(allow, routes[i].method))
            add_method(allow, routes[i].method);
        if (strcmp(routes[i].method, method) != 0 || literals <= best_literals)
            continue;
        best = &routes[i];
        best_literals = literals;
        memcpy(params, found, sizeof(found));
    }
    if (allow[0])
        add_method(allow, "OPTIONS");
    return best;
}
