/* What a compression of two models holds, from the shapes of a base, before anything is opened. */
#include <string.h>

#include "engine/codec/codec.h"
#include "engine/codec/compression.h"
#include "engine/codec/distill.h"
#include "engine/codec/lessons.h"
#include "engine/engine.h"

#define MATRICES_OF_A_LAYER 7

/* In F32 matrices are read from the files, page by page, and pages that were read may go
 * (open_matrix of cpu/cpu_backend.c, tuned.c). Everywhere else both models are copied. */
static int64_t copies(const struct engine_base_info *info, const struct engine_options *engine,
                      bool cpu)
{
    bool mapped = cpu && engine->precision != ENGINE_PRECISION_BF16;

    return mapped ? 0 : 2 * engine_weight_bytes(info, engine);
}

/* On the widest matrices, of hidden · intermediate. Codecs without vectors make do with the
 * difference, the base and what they make of them; without statistics there is no metric, and
 * vectors come of the shorter side. */
static int64_t work(const struct engine_base_info *info, const struct codec *codec, bool rows)
{
    int64_t hidden = info->hidden, middle = info->intermediate;
    int64_t most = compression_work_bytes(hidden, middle), one = most;
    int64_t count = COMPRESSION_MEMORY / most; /* at once */

    if (!codec->energy)
        one = 16 * hidden * middle;
    else if (!rows)
        one = 8 * (6 * hidden * middle + 3 * hidden * hidden);
    if (count > MATRICES_OF_A_LAYER * info->layers)
        count = MATRICES_OF_A_LAYER * info->layers;
    return one * (count > 1 ? count : 1);
}

/* Sums of calibration.h. Of inputs alone matrices that read the same share them. */
static int64_t statistics(const struct engine_base_info *info, const struct codec *codec)
{
    int64_t hidden = info->hidden, middle = info->intermediate;
    int64_t query = (int64_t)info->head_dim * info->heads;
    int64_t kv = (int64_t)info->head_dim * info->kv_heads;
    int64_t of_layer = codec->gradients ? 7 * hidden * hidden + 2 * query * query + 2 * kv * kv +
                                              3 * middle * middle
                                        : 2 * hidden * hidden + query * query + middle * middle;

    return codec->inputs ? 4 * info->layers * of_layer : 0;
}

/* Matrices and gradients of the blocks, what the teacher gave (lessons.h), and of a step what is
 * largest: the logits of both and their gradients. */
static int64_t distillation(const struct engine_base_info *info, const struct codec *codec,
                            const struct engine_compress_options *options, int64_t tokens)
{
    int32_t steps = options->distill_steps >= 0 ? options->distill_steps : codec->distill_steps;
    int64_t lessons = 4 * tokens * info->hidden;
    int64_t step = 4 * 4 * (int64_t)DISTILL_ROWS * info->vocabulary;

    if (!codec->scales || steps == 0)
        return 0;
    return 8 * info->linear_parameters + step + (lessons < LESSONS_BYTES ? lessons : LESSONS_BYTES);
}

int64_t engine_compress_bytes(const struct engine_base_info *info,
                              const struct engine_options *engine,
                              const struct engine_compress_options *options, int64_t tokens)
{
    const struct codec *codec = codec_find(options->codec ? options->codec : codec_default());
    bool cpu = engine->device == NULL || strcmp(engine->device, "cpu") == 0;
    int64_t bytes = copies(info, engine, cpu), made, distilled;

    if (!cpu || !codec) /* the rest is the host's */
        return bytes;
    made = work(info, codec, tokens > 0);
    if (tokens == 0)
        return bytes + made;
    made += statistics(info, codec);
    distilled = distillation(info, codec, options, tokens);
    if (options->max_kl > 0) /* sizes are tried one after the other, by the same statistics */
        distilled += statistics(info, codec);
    return bytes + (made > distilled ? made : distilled);
}
