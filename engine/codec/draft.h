/* draft.h: the file of a compression until it is complete: NAME.PID.draft, beside its place. What
 * stands at the place is only ever complete, and what stood there before stays until then.
 *
 *   draft_open -> a file is written to `path` and measured -> draft_keep -> draft_place
 *
 * Several may be written and kept in turn: one that is kept stays until the next is. draft_close
 * removes what has not come to the place. A process that is killed leaves its drafts; others do not
 * remove them, for whoever made them may still be at work. */
#ifndef GRAFT_CODEC_DRAFT_H
#define GRAFT_CODEC_DRAFT_H

#include "engine/base/err.h"

struct draft {
    const char *place;
    char *path; /* what is written and measured now; not there before */
    char *kept; /* NAME.PID.kept.draft: the best of what was, with its report */
};

/* `place` must outlive it. Refuses a place where no file can be made, before any work is done for
 * one: the message names it. */
int draft_open(struct draft *draft, const char *place, struct err *err);
void draft_close(struct draft *draft); /* after a failed open too; a zeroed struct is fine */

/* What is at `path`, which nobody may have open, with this report (artifact_set_report). */
int draft_keep(struct draft *draft, const char *report, struct err *err);
/* What was kept last, durably. */
int draft_place(struct draft *draft, struct err *err);

#endif
