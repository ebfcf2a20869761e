/* blob_sound.h: whether a stored file still is what its digest says. It is read to its end to know;
 * what was found sound is believed for some minutes while it looks untouched, so that who asks for
 * a large file again and again does not keep a disk busy. Any thread. */
#ifndef GRAFT_BLOB_SOUND_H
#define GRAFT_BLOB_SOUND_H

#include "storage/blob_store.h"

struct blob_sound; /* what is believed; opaque */

struct blob_sound *blob_sound_new(void); /* NULL: out of memory */
void blob_sound_free(struct blob_sound *sound);

/* fd, which stays open and at its beginning: a file of the blob that is wanted. ERR_IO, code
 * damaged_file and worded for a client, where it has other bytes or can not be read; also what
 * want->go_on says. */
int blob_sound_check(struct blob_sound *sound, int fd, const struct blob_wanted *want,
                     struct err *err);

#endif
