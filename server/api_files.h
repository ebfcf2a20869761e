/* api_files.h: /v1/files: upload, list, look, read, delete. The contract's OpenAIFile. */
#ifndef GRAFT_API_FILES_H
#define GRAFT_API_FILES_H

#include "server/http_request.h"
#include "server/http_response.h"

/* The bytes are durable before the row is written. A file with purpose fine-tune or batch must look
 * like JSONL (its first 64 kB are looked at); what its lines say is the job's to judge. */
int api_files_create(struct http_request *request, struct http_response *response, struct err *err);
int api_files_list(struct http_request *request, struct http_response *response, struct err *err);
int api_files_get(struct http_request *request, struct http_response *response, struct err *err);
int api_files_content(struct http_request *request, struct http_response *response,
                      struct err *err);
int api_files_delete(struct http_request *request, struct http_response *response, struct err *err);

/* ERR_INVALID, with the line, where the first bytes of a file are not JSONL. `whole`: they are all
 * of the file. */
int api_files_check_jsonl(const char *head, size_t len, bool whole, struct err *err);

#endif
