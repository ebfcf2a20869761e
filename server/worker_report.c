#include "server/worker_report.h"

#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdlib.h>

#include "engine/base/strbuf.h"

static json_t *real_or_null(double v)
{
    return isfinite(v) ? json_real(v) : json_null();
}

static char *data_text(const struct engine_delta_report *r)
{
    const struct {
        const char *key;
        double value;
    } reals[] = {
        {"ratio", r->ratio},
        {"relative_error", r->relative_error},
        {"seconds", r->seconds},
    };
    json_t *data = json_pack("{s:s, s:I}", "codec", r->codec, "bytes", (json_int_t)r->bytes);
    char *text = NULL;
    bool ok = data != NULL;

    for (size_t i = 0; ok && i < sizeof reals / sizeof reals[0]; i++)
        ok = json_object_set_new(data, reals[i].key, real_or_null(reals[i].value)) == 0;
    if (ok)
        text = json_dumps(data, JSON_COMPACT | JSON_REAL_PRECISION(8));
    json_decref(data);
    return text;
}

static char *message_text(const struct engine_delta_report *r)
{
    struct strbuf sb;

    strbuf_init(&sb, 512);
    strbuf_addf(&sb, "Compressed by %s: ", r->codec);
    if (r->bytes < 100000)
        strbuf_addf(&sb, "%.1f kB", (double)r->bytes / 1e3);
    else
        strbuf_addf(&sb, "%.1f MB", (double)r->bytes / 1e6);
    if (isfinite(r->ratio))
        strbuf_addf(&sb, ", 1/%.*f of the 16-bit model", r->ratio < 9.95 ? 1 : 0, r->ratio);
    return strbuf_detach(&sb, NULL);
}

int worker_report_format(const struct engine_delta_report *report, char **message, char **data,
                         struct err *err)
{
    *message = message_text(report);
    *data = data_text(report);
    if (*message != NULL && *data != NULL)
        return 0;
    free(*message);
    free(*data);
    *message = *data = NULL;
    return err_set(err, ERR_NO_MEMORY, "report: out of memory");
}
