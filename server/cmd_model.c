#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "engine/base/file_io.h"
#include "engine/engine.h"
#include "server/cmd.h"
#include "server/cmd_session.h"
#include "storage/bases.h"

static void print_base(const struct base *b)
{
    printf("%s\t%s\t%" PRId64 " parameters\t%d layers\tcontext %d\t%s\n", b->name, b->architecture,
           b->parameters, (int)b->layers, (int)b->context, b->digest);
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
