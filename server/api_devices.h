/* api_devices.h: GET /v1/graft/devices. */
#ifndef GRAFT_API_DEVICES_H
#define GRAFT_API_DEVICES_H

#include "server/http_request.h"
#include "server/http_response.h"

/* Each worker with its device. A job is named to its own project only; others see that the device
 * is busy. */
int api_devices_list(struct http_request *request, struct http_response *response, struct err *err);

#endif
