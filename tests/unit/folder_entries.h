/* folder_entries.h: how many names a folder holds, for tests of what is left behind; "." and ".."
 * count. */
#ifndef GRAFT_TESTS_FOLDER_ENTRIES_H
#define GRAFT_TESTS_FOLDER_ENTRIES_H

#include <dirent.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

static inline int folder_entries(const char *path)
{
    DIR *dir = opendir(path);
    int count = 0;

    assert_non_null(dir);
    while (readdir(dir) != NULL)
        count++;
    closedir(dir);
    return count;
}

#endif
