/* replay_main.c: runs a fuzz target over files, once each, where libFuzzer is not at hand.
 *
 * usage: fuzz_X FILE_OR_FOLDER...    exit status 0 when all of them came back; a target that finds
 * something aborts, and the last line names the file. */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "engine/base/file_io.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static long replayed;

static int replay_file(const char *path)
{
    struct err err = {0};
    char *data = NULL, *exact;
    size_t len = 0;

    if (file_read_all(path, 64u << 20, &data, &len, &err) != 0) {
        fprintf(stderr, "%s\n", err.message);
        return -1;
    }
    /* A block of just this size, so that a sanitizer sees the first byte read behind it. */
    exact = malloc(len ? len : 1);
    if (exact == NULL) {
        free(data);
        return -1;
    }
    memcpy(exact, data, len);
    free(data);
    fprintf(stderr, "replay %s\n", path);
    LLVMFuzzerTestOneInput((const uint8_t *)exact, len);
    free(exact);
    replayed++;
    return 0;
}

static int replay(const char *path)
{
    struct stat st;
    DIR *dir;
    struct dirent *entry;
    int rc = 0;

    if (stat(path, &st) != 0) {
        perror(path);
        return -1;
    }
    if (!S_ISDIR(st.st_mode))
        return replay_file(path);
    dir = opendir(path);
    if (dir == NULL) {
        perror(path);
        return -1;
    }
    while (rc == 0 && (entry = readdir(dir)) != NULL) {
        char inner[4096];

        if (entry->d_name[0] == '.')
            continue;
        if (snprintf(inner, sizeof inner, "%s/%s", path, entry->d_name) >= (int)sizeof inner) {
            fprintf(stderr, "%s/%s: path too long\n", path, entry->d_name);
            rc = -1;
            break;
        }
        rc = replay(inner);
    }
    closedir(dir);
    return rc;
}

int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        if (replay(argv[i]) != 0)
            return 1;
    printf("%ld inputs replayed\n", replayed);
    return replayed > 0 ? 0 : 1;
}
