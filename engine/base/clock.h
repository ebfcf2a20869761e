/* clock.h: seconds that only go forward, also while the machine sleeps (CLOCK_BOOTTIME). For
 * deadlines and durations; points in time that others see come from the database. */
#ifndef GRAFT_CLOCK_H
#define GRAFT_CLOCK_H

double clock_now(void); /* s, from some moment on */

#endif
