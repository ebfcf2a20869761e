#include "storage/pg_process.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <pwd.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static int user_fill(const struct passwd *entry, struct pg_user *out)
{
    out->change = geteuid() == 0;
    out->uid = entry->pw_uid;
    out->gid = entry->pw_gid;
    snprintf(out->name, sizeof out->name, "%s", entry->pw_name);
    return 0;
}

int pg_user_choose(struct pg_user *out, struct err *err)
{
    static const char *const names[] = {"postgres", "nobody"};
    struct passwd entry, *found = NULL;
    char buf[4096];

    if (geteuid() != 0) {
        *out = (struct pg_user){.uid = geteuid(), .gid = getegid(), .name = "this user"};
        return 0;
    }
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (getpwnam_r(names[i], &entry, buf, sizeof buf, &found) == 0 && found != NULL &&
            found->pw_uid != 0)
            return user_fill(found, out);
    return err_set(err, ERR_INVALID,
                   "PostgreSQL does not run as root, and there is no user postgres or nobody: "
                   "run graft as another user, or give a database URL");
}

int pg_user_of(const char *dir, struct pg_user *out, struct err *err)
{
    struct passwd entry, *found = NULL;
    struct stat st;
    char buf[4096];

    if (stat(dir, &st) != 0)
        return err_set_errno(err, errno, "look at %s", dir);
    if (geteuid() != 0 && st.st_uid != geteuid())
        return err_set(err, ERR_INVALID,
                       "%s belongs to another user (uid %u): run graft as that user or as root",
                       dir, (unsigned)st.st_uid);
    if (st.st_uid == 0)
        return err_set(err, ERR_INVALID,
                       "%s belongs to root, but PostgreSQL does not run as root: chown -R postgres "
                       "it",
                       dir);
    *out = (struct pg_user){.change = geteuid() == 0, .uid = st.st_uid, .gid = st.st_gid};
    if (getpwuid_r(st.st_uid, &entry, buf, sizeof buf, &found) == 0 && found != NULL)
        return user_fill(found, out);
    snprintf(out->name, sizeof out->name, "uid %u", (unsigned)st.st_uid);
    return 0;
}

/* ------------------------------------------------------------------ processes */

#define ARGV_MAX 64
/* The data folder as the programs see it where their user may not walk the path to it. They change
 * their working directory as they start, so /proc/self/cwd would not do. */
#define DATA_FD 63
#define DATA_FD_PATH "/proc/self/fd/63"

/* Between fork and exec only async-signal-safe calls: other threads may hold any lock. */
static void become(const struct pg_process *p, char *const envp[])
{
    const char *argv[ARGV_MAX];
    sigset_t none;
    int null, folder;

    sigemptyset(&none);
    for (int s = 1; s < NSIG; s++)
        signal(s, SIG_DFL);
    sigprocmask(SIG_SETMASK, &none, NULL);
    umask(077);
    null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (null < 0 || dup2(null, 0) < 0 || dup2(p->output, 1) < 0 || dup2(p->output, 2) < 0)
        _exit(126);
    folder = open(p->data, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (folder < 0 || dup2(folder, DATA_FD) < 0 || chdir("/") != 0) /* the copy stays open */
        _exit(126);
    /* The postmaster may outlive us: a pipe that our caller gave us must not stay open with it.
     * (Before Linux 5.9 it does.) */
    close_range(3, DATA_FD - 1, 0);
    close_range(DATA_FD + 1, ~0U, 0);
    if (p->user->change && (setgroups(1, &p->user->gid) != 0 || setgid(p->user->gid) != 0 ||
                            setuid(p->user->uid) != 0))
        _exit(126);
    for (int i = 0; i < ARGV_MAX; i++) {
        argv[i] = p->argv[i];
        if (argv[i] == NULL)
            break;
        if (strcmp(argv[i], PG_PROCESS_DATA) == 0)
            argv[i] = access(p->data, X_OK) == 0 ? p->data : DATA_FD_PATH;
    }
    argv[0] = p->program; /* they look for one another beside the path they were called by */
    execve(p->program, (char *const *)argv, envp);
    _exit(127);
}

static pid_t wait_for(pid_t pid, int *status)
{
    pid_t got;

    while ((got = waitpid(pid, status, 0)) < 0 && errno == EINTR)
        ;
    return got;
}

static char *const clean_environment[] = {"PATH=/usr/local/bin:/usr/bin:/bin", "LC_ALL=C", "TZ=UTC",
                                          "HOME=/", NULL};

int pg_process_run(const struct pg_process *process, int *status, struct err *err)
{
    pid_t pid = fork();

    if (pid < 0)
        return err_set_errno(err, errno, "start %s", process->program);
    if (pid == 0)
        become(process, clean_environment);
    if (wait_for(pid, status) != pid)
        return err_set_errno(err, errno, "wait for %s", process->program);
    return 0;
}

int pg_process_start(const struct pg_process *process, struct err *err)
{
    int status = 0;
    pid_t pid = fork();

    if (pid < 0)
        return err_set_errno(err, errno, "start %s", process->program);
    if (pid == 0) {
        pid_t grandchild;

        setsid();
        grandchild = fork();
        if (grandchild == 0)
            become(process, clean_environment);
        _exit(grandchild < 0 ? 126 : 0);
    }
    if (wait_for(pid, &status) != pid || status != 0)
        return err_set(err, ERR_INTERNAL, "start %s: the process did not come up",
                       process->program);
    return 0;
}

static bool zombie(pid_t pid)
{
    char path[64], text[256];
    ssize_t n;
    char *paren;
    int fd;

    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return true;
    n = read(fd, text, sizeof text - 1);
    close(fd);
    if (n <= 0)
        return true;
    text[n] = '\0';
    paren = strrchr(text, ')'); /* the name before it may hold anything */
    return paren == NULL || paren[1] == '\0' || paren[2] == 'Z' || paren[2] == 'X';
}

enum pg_process_state pg_process_look(pid_t pid, const char *data)
{
    struct stat cwd, ours;
    char path[64];

    if (pid <= 1 || (kill(pid, 0) != 0 && errno == ESRCH))
        return PG_PROCESS_GONE;
    if (zombie(pid))
        return PG_PROCESS_OTHER;
    snprintf(path, sizeof path, "/proc/%d/cwd", (int)pid);
    if (stat(path, &cwd) != 0 || stat(data, &ours) != 0)
        return errno == ENOENT ? PG_PROCESS_GONE : PG_PROCESS_UNKNOWN;
    return cwd.st_dev == ours.st_dev && cwd.st_ino == ours.st_ino ? PG_PROCESS_OURS
                                                                  : PG_PROCESS_OTHER;
}
