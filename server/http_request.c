#include "server/http_request.h"

#include <string.h>

static const char *find(const struct http_pair *pairs, int count, const char *name)
{
    for (int i = 0; i < count; i++)
        if (strcmp(pairs[i].name, name) == 0)
            return pairs[i].value;
    return NULL;
}

const char *http_request_query(const struct http_request *request, const char *name)
{
    return find(request->query, request->query_count, name);
}

const char *http_upload_field(const struct http_upload *upload, const char *name)
{
    return find(upload->fields, upload->field_count, name);
}
