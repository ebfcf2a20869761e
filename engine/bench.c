#include "engine/bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

int bench_open_model(struct engine **engine, const char *path, const struct engine_options *options,
                     struct err *err)
{
    char base[] = P_tmpdir "/graft-bench-XXXXXX";
    struct engine_base_info info;
    int fd, rc;

    if (engine_base_read(path, &info, NULL) == 0)
        return engine_open(engine, path, options, err);
    fd = mkstemp(base);
    if (fd < 0)
        return err_set(err, ERR_IO, "no temporary file in " P_tmpdir);
    close(fd);
    rc = engine_import(path, base, &info, err);
    if (rc == 0)
        rc = engine_open(engine, base, options, err);
    unlink(base);
    return rc;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

double bench_median(double *x, int32_t n)
{
    qsort(x, (size_t)n, sizeof *x, by_value);
    return n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

double bench_clock(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}
