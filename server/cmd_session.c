#include "server/cmd_session.h"

#include "server/cmd.h"

int cmd_session_begin(struct cmd_session *session, const struct settings *settings,
                      enum db_role role, struct err *err)
{
    const char *url = settings->database[0] != '\0' ? settings->database : NULL;

    *session = (struct cmd_session){.db = NULL};
    if (storage_open(&session->storage, settings->data, url, err) != 0)
        return -1;
    return db_open(&session->db, session->storage.url, role, err);
}

int cmd_session_end(struct cmd_session *session, int rc)
{
    db_close(session->db);
    storage_release(&session->storage);
    return rc == 0 ? CMD_DONE : CMD_FAILED;
}
