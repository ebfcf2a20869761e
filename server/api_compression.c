#include "server/api_compression.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine/engine.h"
#include "server/api_check.h"

#define RATIO_MAX 1024.0
#define KL_MAX 100.0 /* nats per token: far more than a model that knows nothing has */
#define DISTILL_MAX 10000

static int read_codec(const struct api_member *member, struct job_compression *out, struct err *err)
{
    const char *name = "";
    if (api_check_string(member, 1, 64, &name, err) < 0)
        return -1;
    if (name[0] && (!engine_codec_known(name) || strlen(name) >= sizeof(out->codec)))
        return err_set_code(err, ERR_INVALID, "invalid_value", member->path,
                            "Invalid value: '%.64s'. Supported values are: %s.", name,
                            engine_codec_makers());
    if (name[0] && !engine_codec_makes(name))
        return err_set_code(err, ERR_INVALID, "invalid_value", member->path,
                            "Invalid value: '%s'. It keeps adapters that were made elsewhere as "
                            "they are: make its delta with 'graft delta compress' and upload that. "
                            "Supported values are: %s.",
                            name, engine_codec_makers());
    snprintf(out->codec, sizeof(out->codec), "%s", name);
    return 0;
}

static int read_budget(const struct api_member *ratio, const struct api_member *max_kl,
                       struct job_compression *out, struct err *err)
{
    double kl = -1;
    if (api_check_number(ratio, 1, RATIO_MAX, &out->ratio, err) < 0 ||
        api_check_number(max_kl, 0, KL_MAX, &kl, err) < 0)
        return -1;
    if (kl == 0)
        return err_set_code(err, ERR_INVALID, "decimal_below_min_value", max_kl->path,
                            "Invalid '%s': decimal below minimum value. Expected a value > 0, "
                            "but got 0 instead.",
                            max_kl->path);
    if (kl > 0 && out->ratio > 0)
        return err_set_code(err, ERR_INVALID, "invalid_value", max_kl->path,
                            "Invalid '%s': it can not be given together with '%s'. Give the size "
                            "of the file or its cost, not both.",
                            max_kl->path, ratio->path);
    out->max_kl = kl > 0 ? kl : 0;
    return 0;
}

/* Some codecs keep what they keep, whatever that takes. */
static int check_sized(const struct job_compression *c, const char *ratio, const char *max_kl,
                       struct err *err)
{
    const char *asked = c->ratio > 0 ? ratio : max_kl;
    if (!c->codec[0] || engine_codec_sized(c->codec) || (c->ratio <= 0 && c->max_kl <= 0))
        return 0;
    return err_set_code(err, ERR_INVALID, "invalid_value", asked,
                        "Invalid '%s': the codec %s has the size that comes of what it keeps. "
                        "Leave out '%s' and '%s', or choose another codec.",
                        asked, c->codec, ratio, max_kl);
}

int api_compression_read(const json_t *object, const char *path, struct job_compression *out,
                         struct err *err)
{
    char paths[4][64];
    const char *const keys[] = {"codec", "ratio", "max_kl", "distill_steps"};
    struct api_member members[4];
    int64_t steps = -1;
    *out = (struct job_compression){.distill_steps = -1};
    if (!object)
        return 0;
    for (int i = 0; i < 4; i++) {
        snprintf(paths[i], sizeof(paths[i]), "%s.%s", path, keys[i]);
        members[i] = (struct api_member){object, keys[i], paths[i], false};
    }
    if (read_codec(&members[0], out, err) < 0 ||
        read_budget(&members[1], &members[2], out, err) < 0 ||
        check_sized(out, paths[1], paths[2], err) < 0 ||
        api_check_integer(&members[3], 0, DISTILL_MAX, &steps, err) < 0)
        return -1;
    out->distill_steps = (int32_t)steps;
    return 0;
}

int api_compression_check(const struct job_compression *c, const char *path,
                          struct blob_store *blobs, const char *base_sha256, bool embeddings,
                          struct err *err)
{
    const char *codec = c->codec[0] ? c->codec : NULL;
    struct engine_delta_size least;
    char *base_path = NULL, param[96];
    int rc;
    if (c->ratio <= 0)
        return 0;
    if (blob_path(blobs, BLOB_OWNER_BASE, base_sha256, &base_path, err) < 0)
        return -1;
    rc = engine_delta_least(base_path, codec, embeddings, &least, err);
    free(base_path);
    if (rc < 0 || c->ratio <= least.ratio)
        return rc;
    snprintf(param, sizeof(param), "%s.ratio", path);
    return err_set_code(err, ERR_INVALID, "decimal_above_max_value", param,
                        "Invalid '%s': decimal above maximum value. Expected a value <= %.2f, but "
                        "got %g instead: a delta of this model takes at least %lld bytes%s%s%s.",
                        param, floor(least.ratio * 100) / 100, c->ratio, (long long)least.bytes,
                        codec ? " with the codec " : "", codec ? codec : "",
                        embeddings ? ", since its embeddings are trained" : "");
}

static json_t *real_or_null(double n)
{
    return n > 0 ? json_real(n) : json_null();
}

json_t *api_compression_json(const struct job_compression *c)
{
    return json_pack("{s:o, s:o, s:o, s:o}", "codec",
                     c->codec[0] ? json_string(c->codec) : json_null(), "ratio",
                     real_or_null(c->ratio), "max_kl", real_or_null(c->max_kl), "distill_steps",
                     c->distill_steps >= 0 ? json_integer(c->distill_steps) : json_null());
}
