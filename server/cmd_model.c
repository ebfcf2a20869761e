#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "engine/base/file_io.h"
#include "engine/engine.h"
#include "server/cmd.h"
#include "server/cmd_session.h"
#include "storage/bases.h"

static void describe(struct base *base, const char *name, const struct engine_base_info *info)
{
    *base = (struct base){.parameters = info->parameters,
                          .linear_parameters = info->linear_parameters,
                          .bytes_16bit = info->bytes_16bit,
                          .layers = info->layers,
                          .hidden = info->hidden,
                          .intermediate = info->intermediate,
                          .heads = info->heads,
                          .kv_heads = info->kv_heads,
                          .vocabulary = info->vocabulary,
                          .context = info->context,
                          .tied_embeddings = info->tied_embeddings};
    snprintf(base->name, sizeof base->name, "%s", name);
    snprintf(base->digest, sizeof base->digest, "%s", info->digest);
    snprintf(base->architecture, sizeof base->architecture, "%s", info->architecture);
}

static void print_base(const struct base *b)
{
    printf("%s\t%s\t%" PRId64 " parameters\t%d layers\tcontext %d\t%s\n", b->name, b->architecture,
           b->parameters, (int)b->layers, (int)b->context, b->digest);
}

/* Import writes into staging; the blob is durable before the row names it. */
static int import(struct cmd_session *s, const char *path, const char *name, struct err *err)
{
    struct engine_base_info info;
    char *dir = NULL, *file = NULL;
    struct base base;
    int rc = -1;

    if (blob_staging_dir(s->storage.blobs, NULL, 0, &dir, err) != 0)
        return -1;
    if (asprintf(&file, "%s/base.safetensors", dir) < 0) {
        file = NULL;
        err_set(err, ERR_NO_MEMORY, "import: out of memory");
        goto out;
    }
    if (engine_import(path, file, &info, err) != 0)
        goto out;
    describe(&base, name, &info);
    if (blob_adopt(s->storage.blobs, BLOB_OWNER_BASE, file, base.sha256, &base.bytes, err) != 0 ||
        bases_add(s->db, &base, err) != 0)
        goto out;
    print_base(&base);
    rc = 0;
out:
    file_remove_tree(dir, NULL);
    free(file);
    free(dir);
    return rc;
}

int cmd_model_import(const struct settings *settings, const struct setting_args *args,
                     struct err *err)
{
    const char *name = args->options[CMD_MODEL_NAME];
    struct cmd_session s;
    int rc;

    if (name == NULL) {
        err_set(err, ERR_INVALID, "--name is missing");
        return CMD_USAGE;
    }
    if (!bases_name_valid(name)) {
        err_set(err, ERR_INVALID,
                "--name \"%s\": 1 to 64 letters, digits, '.', '_', '-' and inner '/', first a "
                "letter or digit",
                name);
        return CMD_USAGE;
    }
    rc = cmd_session_begin(&s, settings, DB_ROLE_OWNER, err);
    if (rc == 0)
        rc = import(&s, args->args[0], name, err);
    return cmd_session_end(&s, rc);
}

int cmd_model_list(const struct settings *settings, const struct setting_args *args,
                   struct err *err)
{
    struct base_list list = {0};
    struct cmd_session s;
    int rc = cmd_session_begin(&s, settings, DB_ROLE_OWNER, err);

    if (rc == 0)
        rc = bases_list(s.db, &list, err);
    for (int i = 0; rc == 0 && i < list.count; i++)
        print_base(&list.items[i]);
    base_list_release(&list);
    return cmd_session_end(&s, rc);
}
