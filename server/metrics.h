/* metrics.h: what GET /metrics says, in Prometheus's text format 0.0.4, and the counters behind it.
 *
 * Counting is lock-free and allocates nothing after the first request of a route. */
#ifndef GRAFT_METRICS_H
#define GRAFT_METRICS_H

#include "server/http_request.h"
#include "server/http_response.h"

/* One answered request. `operation`: of the route, a static string; NULL where no route matched.
 * seconds: from the complete headers to the end of the answer. Any thread. */
void metrics_count_request(const char *operation, int status, double seconds);

/* The route's handler (HTTP_AUTH_NONE). Jobs are counted by state over all tenants; without a
 * database that part is left out and graft_database_up is 0. */
int metrics_get(struct http_request *request, struct http_response *response, struct err *err);

#endif
