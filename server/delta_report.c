#include "server/delta_report.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>

#include "engine/base/strbuf.h"

static json_t *real_or_null(double v)
{
    return isfinite(v) ? json_real(v) : json_null();
}

json_t *delta_report_object(const struct engine_delta_report *r)
{
    const struct {
        const char *key;
        double value;
    } reals[] = {
        {"ratio", r->ratio},
        {"linear_ratio", r->linear_ratio},
        {"relative_error", r->relative_error},
        {"predicted_kl", r->predicted_kl},
        {"measured_kl", r->measured_kl},
        {"answer_kl", r->answer_kl},
        {"held_out_loss", r->held_out_loss},
        {"tuned_loss", r->tuned_loss},
        {"seconds", r->seconds},
        {"statistics_seconds", r->statistics_seconds},
        {"distill_seconds", r->distill_seconds},
        {"measure_seconds", r->measure_seconds},
    };
    json_t *data =
        json_pack("{s:s, s:I, s:I, s:I, s:I, s:i}", "codec", r->codec, "bytes",
                  (json_int_t)r->bytes, "linear_bytes", (json_int_t)r->linear_bytes,
                  "measured_tokens", (json_int_t)r->measured_tokens, "calibration_tokens",
                  (json_int_t)r->calibration_tokens, "distill_steps", (int)r->distill_steps);

    for (size_t i = 0; data != NULL && i < sizeof reals / sizeof reals[0]; i++)
        if (json_object_set_new(data, reals[i].key, real_or_null(reals[i].value)) != 0) {
            json_decref(data);
            data = NULL;
        }
    return data;
}

static char *data_text(const struct engine_delta_report *r)
{
    json_t *data = delta_report_object(r);
    char *text = data != NULL ? json_dumps(data, JSON_COMPACT | JSON_REAL_PRECISION(8)) : NULL;

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
    if (isfinite(r->measured_kl))
        strbuf_addf(&sb, ", KL %.2g", r->measured_kl);
    return strbuf_detach(&sb, NULL);
}

int delta_report_format(const struct engine_delta_report *report, char **message, char **data,
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
