/* pg_fixture.h: one real private PostgreSQL cluster for a test program, with two tenants in it.
 *
 * int main(void): cmocka_run_group_tests(tests, fixture_setup, fixture_teardown). Where PostgreSQL
 * is not installed, each test skips by name: begin it with fixture(). */
#ifndef GRAFT_TESTS_PG_FIXTURE_H
#define GRAFT_TESTS_PG_FIXTURE_H

#include "storage/db.h"
#include "storage/files.h"
#include "storage/jobs.h"
#include "storage/keys.h"
#include "storage/leases.h"
#include "storage/storage.h"

struct fixture {
    char dir[32]; /* the data directory */
    struct storage storage;
    struct db *app, *worker, *owner;
    struct key_identity a, b; /* two organizations, one project each */
    char key_a[KEY_TEXT_SIZE], key_b[KEY_TEXT_SIZE];
};

int fixture_setup(void **state);
int fixture_teardown(void **state);
struct fixture *fixture(void); /* skips the running test where there is no PostgreSQL */

/* Asserts that the call returned 0, and prints the error where it did not. */
#define assert_ok(call)                            \
    do {                                           \
        struct err e_ = {0}, *err = &e_;           \
        if ((call) != 0)                           \
            fail_msg("%s: %s", #call, e_.message); \
    } while (0)
/* Asserts that the call failed with this kind. The call names its error `err`. */
#define assert_err(call, expected_kind)                                   \
    do {                                                                  \
        struct err e_ = {0}, *err = &e_;                                  \
        assert_int_equal((call), -1);                                     \
        if (e_.kind != (expected_kind))                                   \
            fail_msg("%s: kind %d: %s", #call, (int)e_.kind, e_.message); \
    } while (0)

/* A committed blob and its row, purpose fine-tune; `id` of the file. */
void fixture_file(struct fixture *f, const char *project, const char *content, char id[ID_SIZE]);
/* A base model "tiny" (once), and a job on it. */
void fixture_base(struct fixture *f);
void fixture_job(struct fixture *f, const char *project, char id[ID_SIZE]);
/* A blob of the project with this content; its digest. */
void fixture_blob(struct fixture *f, const char *project, const char *content,
                  char sha256[SHA256_HEX]);
/* One number from the database, seen as its superuser: past all row-level security. */
int64_t fixture_number(struct fixture *f, const char *sql);
void fixture_admin(struct fixture *f, const char *sql); /* a statement of the superuser */
char *fixture_admin_url(struct fixture *f);             /* free() */

/* Ends every open job of both tenants, so that a test claims its own. */
void fixture_settle(struct fixture *f);
void fixture_claim(struct fixture *f, const char *worker, struct lease *lease);
/* All settled, then one new job of tenant a, claimed by "worker-1". */
void fixture_claimed_job(struct fixture *f, struct lease *lease);
enum job_state fixture_job_state(struct fixture *f, const struct lease *lease);
void fixture_run_out(struct fixture *f, const struct lease *lease); /* the lease is over */
void fixture_end_backoff(struct fixture *f, const struct lease *lease);
void fixture_running(struct fixture *f, const struct lease *lease); /* validated, then running */
/* A success whose artifact has this content; `sha256` must outlive it. */
void fixture_success(struct fixture *f, const struct lease *lease, const char *content,
                     char sha256[SHA256_HEX], struct job_success *success);

#endif
