#include "server/devices.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine/base/clock.h"
#include "engine/base/log.h"
#include "engine/base/strbuf.h"

#define ANSWER_MAX (64 << 10) /* bytes of what the child says */

/* ------------------------------------------------------------------ names */

/* "cuda:12" with kind "cuda" is 12; "cuda" is 0; anything else -1. */
static int number_of(const char *text, const char *kind)
{
    size_t n = strlen(kind);

    if (strncmp(text, kind, n) != 0)
        return -1;
    if (text[n] == '\0')
        return 0;
    if (text[n] != ':' || !isdigit((unsigned char)text[n + 1]) || strlen(text + n + 1) > 2)
        return -1;
    if (text[n + 2] != '\0' && !isdigit((unsigned char)text[n + 2]))
        return -1;
    return atoi(text + n + 1);
}

int devices_name(const char *text, char out[DEVICE_NAME_SIZE], struct err *err)
{
    static const char *const kinds[] = {"cuda", "shim"};

    if (strcmp(text, "cpu") == 0) {
        snprintf(out, DEVICE_NAME_SIZE, "cpu");
        return 0;
    }
    for (int i = 0; i < 2; i++) {
        int number = number_of(text, kinds[i]);

        if (number < 0)
            continue;
        snprintf(out, DEVICE_NAME_SIZE, "%s:%d", kinds[i], number);
        return 0;
    }
    return err_set(err, ERR_INVALID,
                   "\"%.32s\" is no device: use cpu, cuda:N or shim:N (`graft doctor` lists what "
                   "this machine has)",
                   text);
}

bool devices_is_cpu(const char *name)
{
    return strcmp(name, "cpu") == 0;
}

int devices_index(const struct device_list *list, const char *name)
{
    for (int i = 0; i < list->count; i++) {
        if (strcmp(list->name[i], name) == 0)
            return i;
    }
    return -1;
}

int devices_parse(const char *text, struct device_list *out, struct err *err)
{
    const char *at = text;

    *out = (struct device_list){0};
    if (strcmp(text, "auto") == 0)
        return 0;
    for (;;) {
        size_t len = strcspn(at, ",");
        char word[64], name[DEVICE_NAME_SIZE];

        while (len > 0 && isspace((unsigned char)*at))
            at++, len--;
        while (len > 0 && isspace((unsigned char)at[len - 1]))
            len--;
        snprintf(word, sizeof word, "%.*s", (int)(len < 63 ? len : 63), at);
        if (strcmp(word, "auto") == 0)
            return err_set(err, ERR_INVALID, "auto stands alone or not at all");
        if (devices_name(word, name, err) != 0)
            return -1;
        if (devices_index(out, name) >= 0)
            return err_set(err, ERR_INVALID,
                           "%s is there twice: one worker owns a device (on the cpu, "
                           "--workers says how many)",
                           name);
        if (out->count == DEVICES_MAX)
            return err_set(err, ERR_INVALID, "more than %d devices", DEVICES_MAX);
        snprintf(out->name[out->count++], DEVICE_NAME_SIZE, "%s", name);
        at += strcspn(at, ",");
        if (*at == '\0')
            return 0;
        at++;
    }
}

/* ------------------------------------------------------------------ choosing */

static void add(struct device_list *list, const char *name)
{
    if (list->count < DEVICES_MAX)
        snprintf(list->name[list->count++], DEVICE_NAME_SIZE, "%s", name);
}

static bool is_cuda(const char *name)
{
    return strncmp(name, "cuda:", 5) == 0;
}

static int check_there(const char *name, const struct engine_device *found, int count,
                       struct err *err)
{
    char seen[256] = "cpu";

    if (devices_is_cpu(name))
        return 0;
    for (int i = 0; i < count; i++) {
        size_t n = strlen(seen);

        if (strcmp(found[i].name, name) == 0) {
            if (found[i].usable)
                return 0;
            return err_set(err, ERR_INVALID, "%s can not be used: %s", name, found[i].reason);
        }
        if (found[i].usable && !devices_is_cpu(found[i].name) &&
            n < sizeof seen - DEVICE_NAME_SIZE - 3)
            snprintf(seen + n, sizeof seen - n, ", %s", found[i].name);
    }
    return err_set(err, ERR_INVALID,
                   "there is no %s here; what can be used: %s (`graft doctor` says why)", name,
                   seen);
}

/* What auto means. */
static void add_usable(struct device_list *list, const struct engine_device *found, int count)
{
    for (int i = 0; i < count; i++) {
        if (is_cuda(found[i].name) && found[i].usable)
            add(list, found[i].name);
    }
    if (list->count == 0)
        add(list, "cpu");
}

static void describe(struct device_list *list, const struct engine_device *found, int count)
{
    for (int i = 0; i < count; i++) {
        int at = devices_index(list, found[i].name);

        if (at >= 0)
            snprintf(list->description[at], sizeof list->description[at], "%s",
                     found[i].description);
    }
}

int devices_choose(const char *text, const struct engine_device *found, int found_count,
                   struct device_list *out, struct err *err)
{
    if (devices_parse(text, out, err) != 0)
        return -1;
    for (int i = 0; i < out->count; i++) {
        if (check_there(out->name[i], found, found_count, err) != 0)
            return -1;
    }
    if (out->count == 0)
        add_usable(out, found, found_count);
    describe(out, found, found_count);
    return 0;
}

/* ------------------------------------------------------------------ the child's part */

static int print_device(const struct engine_device *d, struct err *err)
{
    json_t *line =
        json_pack("{s:s, s:s, s:I, s:I, s:b, s:s}", "name", d->name, "description", d->description,
                  "memory_bytes", (json_int_t)d->memory_bytes, "memory_free",
                  (json_int_t)d->memory_free, "usable", d->usable, "reason", d->reason);
    int rc = line == NULL ? -1 : json_dumpf(line, stdout, JSON_COMPACT);

    json_decref(line);
    if (rc != 0)
        return err_set(err, ERR_INTERNAL, "device %s can not be printed", d->name);
    putchar('\n');
    return 0;
}

int devices_print(const struct device_list *which, struct err *err)
{
    struct engine_device found[DEVICES_MAX];
    int count = which->count;

    if (count == 0 && engine_devices(found, DEVICES_MAX, &count, err) != 0)
        return -1;
    for (int i = 0; i < which->count; i++) {
        if (engine_device_find(which->name[i], &found[i], err) != 0)
            return -1;
    }
    for (int i = 0; i < count; i++) {
        if (print_device(&found[i], err) != 0)
            return -1;
    }
    return 0;
}

/* ------------------------------------------------------------------ the parent's part */

static int parse_line(const char *line, size_t len, struct engine_device *out, struct err *err)
{
    const char *name, *description, *reason;
    json_int_t bytes, bytes_free;
    json_t *root = json_loadb(line, len, JSON_REJECT_DUPLICATES, NULL);
    int usable, rc = -1;

    if (root == NULL ||
        json_unpack(root, "{s:s, s:s, s:I, s:I, s:b, s:s}", "name", &name, "description",
                    &description, "memory_bytes", &bytes, "memory_free", &bytes_free, "usable",
                    &usable, "reason", &reason) != 0) {
        err_set(err, ERR_UNAVAILABLE, "the look for devices said something else: %.*s",
                len < 80 ? (int)len : 80, line);
        goto out;
    }
    *out = (struct engine_device){
        .memory_bytes = bytes, .memory_free = bytes_free, .usable = usable != 0};
    snprintf(out->name, sizeof out->name, "%s", name);
    snprintf(out->description, sizeof out->description, "%s", description);
    snprintf(out->reason, sizeof out->reason, "%s", reason);
    rc = 0;
out:
    json_decref(root);
    return rc;
}

static int parse_answer(const char *text, struct engine_device *out, int max, int *count,
                        struct err *err)
{
    *count = 0;
    while (*text != '\0' && *count < max) {
        size_t len = strcspn(text, "\n");

        if (parse_line(text, len, &out[*count], err) != 0)
            return -1;
        (*count)++;
        text += len + (text[len] == '\n');
    }
    return 0;
}

/* Only async-signal-safe calls: other threads may have held any lock at the fork. */
static _Noreturn void become_probe(char *const argv[], int output)
{
    sigset_t none;

    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    dup2(output, STDOUT_FILENO);
    execv("/proc/self/exe", argv);
    _exit(127);
}

/* All that comes out of the child, until it closes its end or the time is over. */
static int read_answer(int fd, struct strbuf *text, struct err *err)
{
    double deadline = clock_now() + DEVICES_PROBE_SECONDS, left;
    struct pollfd p = {.fd = fd, .events = POLLIN};
    char buf[4096];

    while ((left = deadline - clock_now()) > 0) {
        ssize_t n;

        if (poll(&p, 1, (int)(1000 * left) + 1) <= 0)
            continue;
        n = read(fd, buf, sizeof buf);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return 0;
        strbuf_add(text, buf, (size_t)n);
    }
    return err_set(err, ERR_UNAVAILABLE,
                   "the look for devices took more than %d s: a driver hangs; restart it, or name "
                   "the devices with --devices",
                   DEVICES_PROBE_SECONDS);
}

static int wait_for_probe(pid_t pid, struct err *err)
{
    int status = 0;

    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        continue;
    if (WIFSIGNALED(status))
        return err_set(err, ERR_UNAVAILABLE,
                       "the look for devices was ended by signal %d: a driver is broken",
                       WTERMSIG(status));
    if (WEXITSTATUS(status) != 0)
        return err_set(err, ERR_UNAVAILABLE,
                       "the look for devices failed with status %d: the lines above say why",
                       WEXITSTATUS(status));
    return 0;
}

/* The list as --device takes it; "auto" for all. */
static void join(const struct device_list *list, char *out, size_t size)
{
    size_t n = 0;

    snprintf(out, size, "auto");
    for (int i = 0; i < list->count; i++)
        n += (size_t)snprintf(out + n, size - n, "%s%s", i > 0 ? "," : "", list->name[i]);
}

int devices_probe(const struct device_list *which, struct engine_device *out, int max, int *count,
                  struct err *err)
{
    char names[DEVICES_MAX * (DEVICE_NAME_SIZE + 1)];
    char *argv[] = {"graft", "work", "--role", "probe", "--device", names, NULL};
    struct strbuf text;
    size_t len;
    char *answer = NULL;
    int ends[2], rc;
    pid_t pid;

    *count = 0;
    join(which, names, sizeof names);
    if (pipe2(ends, O_CLOEXEC) != 0)
        return err_set_errno(err, errno, "devices: pipe");
    pid = fork();
    if (pid == 0)
        become_probe(argv, ends[1]);
    close(ends[1]);
    if (pid < 0) {
        close(ends[0]);
        return err_set_errno(err, errno, "devices: fork");
    }
    strbuf_init(&text, ANSWER_MAX);
    rc = read_answer(ends[0], &text, err);
    close(ends[0]);
    if (rc != 0)
        kill(pid, SIGKILL);
    if (wait_for_probe(pid, err) != 0)
        rc = -1;
    answer = strbuf_detach(&text, &len);
    if (rc == 0 && answer == NULL)
        rc = err_set(err, ERR_NO_MEMORY, "devices: out of memory");
    if (rc == 0)
        rc = parse_answer(answer, out, max, count, err);
    free(answer);
    return rc;
}

/* ------------------------------------------------------------------ both */

static int look(const char *text, struct engine_device *found, int *count, struct err *err)
{
    struct device_list list;
    struct err why = {0};

    *count = 0;
    if (devices_parse(text, &list, err) != 0)
        return -1;
    if (list.count == 1 && devices_is_cpu(list.name[0])) {
        *count = 1;
        return engine_device_find("cpu", found, err);
    }
    if (devices_probe(&list, found, DEVICES_MAX, count, &why) == 0)
        return 0;
    if (list.count > 0)
        return err_set(err, why.kind, "%s", why.message);
    log_warn("%s: going on without", why.message);
    return 0;
}

int devices_find(const char *text, struct device_list *out, struct err *err)
{
    struct engine_device found[DEVICES_MAX];
    int count;

    if (look(text, found, &count, err) != 0)
        return -1;
    return devices_choose(text, found, count, out, err);
}
