/* The operator's commands on the durable state: migrate, key, collect. */
#include <inttypes.h>
#include <stdio.h>
#include <time.h>

#include "server/cmd.h"
#include "server/cmd_session.h"
#include "storage/collector.h"
#include "storage/keys.h"
#include "storage/migrate.h"

int cmd_migrate(const struct settings *settings, const struct setting_args *args, struct err *err)
{
    struct migrate_report report = {0};
    struct cmd_session s;
    int rc = cmd_session_begin(&s, settings, DB_ROLE_OWNER, err);

    /* Opening has migrated; asking again tells the version. */
    if (rc == 0)
        rc = migrate_run(s.storage.url, &report, err);
    if (rc == 0)
        printf("schema version %d\n", report.version);
    return cmd_session_end(&s, rc);
}

int cmd_key_create(const struct settings *settings, const struct setting_args *args,
                   struct err *err)
{
    const char *org = args->options[CMD_KEY_ORG], *project = args->options[CMD_KEY_PROJECT];
    struct key_identity identity;
    char key[KEY_TEXT_SIZE];
    struct cmd_session s;
    int rc;

    if (org == NULL || project == NULL) {
        err_set(err, ERR_INVALID, "%s is missing", org == NULL ? "--org" : "--project");
        return CMD_USAGE;
    }
    rc = cmd_session_begin(&s, settings, DB_ROLE_OWNER, err);
    if (rc == 0)
        rc = keys_create(s.db, org, project, key, &identity, err);
    if (rc == 0) {
        printf("%s\n", key);
        fprintf(stderr, "key %s of project %s in organization %s; it is not shown again\n",
                identity.key_id, identity.project_name, identity.organization);
    }
    return cmd_session_end(&s, rc);
}

static const char *format_time(int64_t seconds, char out[32])
{
    time_t t = (time_t)seconds;
    struct tm utc;

    if (seconds == 0 || gmtime_r(&t, &utc) == NULL)
        return "never";
    strftime(out, 32, "%Y-%m-%dT%H:%M:%SZ", &utc);
    return out;
}

int cmd_key_list(const struct settings *settings, const struct setting_args *args, struct err *err)
{
    struct key_list list = {0};
    char made[32], used[32];
    struct cmd_session s;
    int rc = cmd_session_begin(&s, settings, DB_ROLE_OWNER, err);

    if (rc == 0)
        rc = keys_list(s.db, &list, err);
    for (int i = 0; rc == 0 && i < list.count; i++) {
        const struct key_info *k = &list.items[i];

        printf("%s\t%s/%s\t%s\t%s\t%s\n", k->identity.key_id, k->identity.organization,
               k->identity.project_name, k->last4, format_time(k->created_at, made),
               format_time(k->last_used_at, used));
    }
    key_list_release(&list);
    return cmd_session_end(&s, rc);
}

int cmd_key_revoke(const struct settings *settings, const struct setting_args *args,
                   struct err *err)
{
    struct cmd_session s;
    int rc = cmd_session_begin(&s, settings, DB_ROLE_OWNER, err);

    if (rc == 0)
        rc = keys_revoke(s.db, args->args[0], err);
    return cmd_session_end(&s, rc);
}

int cmd_collect(const struct settings *settings, const struct setting_args *args, struct err *err)
{
    struct collector_options options = {.grace = (int64_t)settings->grace,
                                        .staging_grace = COLLECTOR_STAGING_GRACE_SECONDS};
    struct collector_report r = {0};
    struct cmd_session s;
    int rc = cmd_session_begin(&s, settings, DB_ROLE_WORKER, err);

    if (options.staging_grace > options.grace)
        options.staging_grace = options.grace;
    if (rc == 0)
        rc = collector_run(s.db, s.storage.blobs, &options, &r, err);
    if (rc == 0)
        printf("blobs %" PRId64 " (%" PRId64 " bytes), staging %" PRId64 ", recovery %" PRId64
               ", expired files %" PRId64 "\n",
               r.blobs, r.blob_bytes, r.staging, r.recovery, r.files_expired);
    return cmd_session_end(&s, rc);
}
