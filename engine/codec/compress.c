/* engine_trainer_compress: a trainer's weights as the tuned side of an artifact. */
#include <stdlib.h>

#include "engine/codec/artifact.h"
#include "engine/engine_parts.h"
#include "engine/trainer.h"

int engine_trainer_compress(struct engine_trainer *trainer, const char *out_path,
                            struct engine_delta_report *report, struct err *err)
{
    const struct engine *engine = trainer_engine(trainer);
    struct artifact_tensor *tensor;
    struct artifact_source source = {.base_digest = engine_info(engine)->digest,
                                     .codec = codec_find("bitdelta"),
                                     .read = trainer_read,
                                     .context = trainer};
    int rc;

    if (artifact_tensors_of_model(engine->model, &tensor, &source.count, err) != 0)
        return -1;
    source.tensor = tensor;
    rc = artifact_write(&source, out_path, report, err);
    if (rc == 0)
        report->ratio = (double)engine_info(engine)->bytes_16bit / (double)report->bytes;
    free(tensor);
    return rc;
}
