/* api_routes.h: every route of the server, in one table (api_routes.c). */
#ifndef GRAFT_API_ROUTES_H
#define GRAFT_API_ROUTES_H

#include "server/http_route.h"

extern const struct http_route api_routes[];
extern const size_t api_route_count;

#endif
