/* progress.h: signs of life from inside a long call into the engine, so that somebody outside can
 * tell one that takes its time from one whose device never answers.
 *
 * A counter rises whenever the engine has heard from its device, or has got on with long work of
 * its own. While the engine waits for something else (a slow disk at an fsync), it says so: silence
 * means nothing then.
 *
 * Lock-free; any thread. */
#ifndef GRAFT_BASE_PROGRESS_H
#define GRAFT_BASE_PROGRESS_H

#include <stdbool.h>
#include <stdint.h>

void progress_tick(void);
uint64_t progress_count(void);

void progress_wait_begin(void); /* for something that is not the device */
void progress_wait_end(void);
bool progress_waits(void);

#endif
