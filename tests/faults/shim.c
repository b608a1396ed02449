/* Faults under a real process, by LD_PRELOAD: libc's file calls counted, failed, stalled, cut short, ended by SIGKILL or
 * written down, and a clock that is off. What to do stands in a control file that is mapped shared, so that a test
 * steers processes that already run; shim.py writes it and must have the same layout. Calls that do not go through
 * libc's dynamic symbols (stdio inside of libc, static binaries, memory maps) are not seen. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { OPEN = 1, WRITE = 2, FSYNC = 4, RENAME = 8, UNLINK = 16, MKDIR = 32, RMDIR = 64, LINK = 128, READ = 256,
       STAT = 512, LIST = 1024, TRUNCATE = 2048, CREATE = 4096, MMAP = 8192 };
enum { COUNT = 0, FAIL = 1, KILL = 2, STALL = 3, CUT = 4 };
enum { RULES = 16, TEXT = 256 };

struct rule {
    _Atomic int32_t active;
    int32_t ops, rank, action, error, times; /* rank -1: any process; times -1: for ever */
    int64_t nth;                             /* the first call that is hit, from 1 */
    double stall_s;
    _Atomic int64_t calls, hits;
    char path[TEXT], release[TEXT]; /* part of the absolute path; the file that ends a stall */
};

struct control {
    _Atomic int32_t rules, recording;
    _Atomic int64_t clock_offset_ns;
    int64_t free_bytes; /* what statvfs tells below `path`; -1: the truth */
    char path[TEXT], record[TEXT]; /* what is written down: calls below this folder; and into which file */
    struct rule rule[RULES];
};

struct record { /* followed by path, second path, data */
    uint32_t magic;
    int32_t op, rank, pid;
    int64_t result, inode, offset;
    int32_t flags;
    uint32_t path, path2, data;
    double time;
};

static struct control *control;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_mutex_t recorder = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

static long raw_open(const char *path, int flags, int mode) {
    return syscall(SYS_openat, AT_FDCWD, path, flags | O_CLOEXEC, mode);
}

static void map_control(void) {
    const char *path = getenv("FAULTS_CONTROL");
    long fd = path ? raw_open(path, O_RDWR, 0) : -1;
    if (fd < 0) return;
    void *at = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, (int)fd, 0);
    if (at != MAP_FAILED) control = at;
    syscall(SYS_close, fd);
}

/* After a fork the child has one thread, so nobody it could wait for holds the recorder. */
static void renew(void) { pthread_mutex_init(&recorder, NULL); }

__attribute__((constructor)) static void begin(void) {
    pthread_once(&once, map_control);
    pthread_atfork(NULL, NULL, renew);
}

static int busy(void) { return control && (control->rules || control->recording); }

static int rank_here(void) {
    const char *rank = getenv("RANK");
    return rank && *rank ? atoi(rank) : -2;
}

/* Absolute path of `path` as seen from the folder `dirfd`; with path NULL that of the descriptor itself. */
static void absolute(int dirfd, const char *path, char *out) {
    char link[64];
    ssize_t n = 0;
    out[0] = 0;
    if (!path || path[0] != '/') {
        if (dirfd == AT_FDCWD) {
            if (!getcwd(out, PATH_MAX)) out[0] = 0;
            n = (ssize_t)strlen(out);
        } else {
            int at = sizeof link - 1;
            link[at] = 0;
            int left = dirfd;
            do link[--at] = (char)('0' + left % 10); while (left /= 10);
            at -= 14;
            memcpy(link + at, "/proc/self/fd/", 14);
            n = syscall(SYS_readlinkat, AT_FDCWD, link + at, out, PATH_MAX - 1);
            if (n < 0) n = 0;
            out[n] = 0;
        }
        if (!path) return;
        if (n < PATH_MAX - 1) out[n++] = '/';
    }
    strncpy(out + n, path, (size_t)(PATH_MAX - 1 - n));
    out[PATH_MAX - 1] = 0;
}

static void stall(struct rule *rule) {
    struct timespec pause = {0, 5000000}, now, begun;
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &begun);
    for (;;) {
        syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &now);
        double passed = (double)(now.tv_sec - begun.tv_sec) + (double)(now.tv_nsec - begun.tv_nsec) / 1e9;
        if (passed >= rule->stall_s || !rule->active) return;
        if (rule->release[0] && syscall(SYS_faccessat, AT_FDCWD, rule->release, F_OK) == 0) return;
        syscall(SYS_nanosleep, &pause, NULL);
    }
}

/* Whether the call is to fail: errno is then set. *cut becomes 1 where half of it is to be done. */
static int hit(int op, const char *path, const char *path2, int *cut) {
    if (!control->rules) return 0;
    int rank = rank_here(), failed = 0;
    for (int i = 0; i < RULES; i++) {
        struct rule *rule = &control->rule[i];
        if (!rule->active || !(rule->ops & op) || (rule->rank != -1 && rule->rank != rank)) continue;
        if (!strstr(path, rule->path) && !(path2 && strstr(path2, rule->path))) continue;
        int64_t call = ++rule->calls;
        if (call < rule->nth || (rule->times >= 0 && call >= rule->nth + rule->times)) continue;
        rule->hits++;
        if (rule->action == KILL) {
            syscall(SYS_kill, getpid(), SIGKILL);
            for (;;) pause();
        }
        if (rule->action == STALL) stall(rule);
        if (rule->action == CUT && cut) *cut = 1;
        if (rule->action == FAIL) { errno = rule->error; failed = 1; }
    }
    return failed;
}

static int recorded(const char *path) {
    size_t n = strlen(control->path);
    return control->recording && strncmp(path, control->path, n) == 0;
}

static long record_begin(const char *path, const char *path2) {
    if (!recorded(path) && !(path2 && recorded(path2))) return -1;
    pthread_mutex_lock(&recorder);
    long fd = raw_open(control->record, O_RDWR | O_APPEND, 0);
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    while (fd >= 0 && syscall(SYS_fcntl, fd, F_OFD_SETLKW, &lock) < 0 && errno == EINTR) {}
    if (fd < 0) pthread_mutex_unlock(&recorder);
    return fd;
}

static void record_end(long fd, int op, int64_t result, int file, int flags, int64_t offset, const char *path,
                       const char *path2, const void *data, size_t size) {
    if (fd < 0) return;
    int error = errno;
    struct stat seen = {0};
    struct timespec now;
    if (file >= 0) syscall(SYS_fstat, file, &seen);
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &now);
    struct record head = {.magic = 0xFA017, .op = op, .rank = rank_here(), .pid = getpid(),
        .result = result < 0 ? -error : result, .inode = (int64_t)seen.st_ino, .offset = offset, .flags = flags,
        .path = (uint32_t)strlen(path), .path2 = path2 ? (uint32_t)strlen(path2) : 0, .data = (uint32_t)size,
        .time = (double)now.tv_sec + (double)now.tv_nsec / 1e9};
    struct iovec parts[4] = {{&head, sizeof head}, {(void *)path, head.path}, {(void *)path2, head.path2},
                             {(void *)data, size}};
    syscall(SYS_writev, fd, parts, 4);
    syscall(SYS_close, fd); /* and with it the lock */
    pthread_mutex_unlock(&recorder);
    errno = error;
}

#define LOOK(op, dirfd, name)                                                                                          \
    char path[PATH_MAX], path2[PATH_MAX] = "";                                                                         \
    int cut = 0;                                                                                                       \
    absolute(dirfd, name, path);                                                                                       \
    if (hit(op, path, NULL, &cut)) return -1;                                                                          \
    (void)path2, (void)cut;

static int do_open(int dirfd, const char *name, int flags, mode_t mode) {
    LOOK(flags & O_CREAT ? CREATE | OPEN : OPEN, dirfd, name)
    int changes = flags & (O_CREAT | O_TRUNC);
    long log = changes ? record_begin(path, NULL) : -1;
    int fd = (int)syscall(SYS_openat, dirfd, name, flags, mode);
    record_end(log, OPEN, fd, fd, flags, 0, path, NULL, NULL, 0);
    return fd;
}

#define MODE(flags) mode_t mode = 0; if ((flags) & (O_CREAT | O_TMPFILE)) { va_list ap; va_start(ap, flags); mode = va_arg(ap, mode_t); va_end(ap); }

#define OPENER(name)                                                                                                   \
    int name(const char *file, int flags, ...) {                                                                       \
        MODE(flags)                                                                                                    \
        if (!busy()) return (int)syscall(SYS_openat, AT_FDCWD, file, flags, mode);                                     \
        return do_open(AT_FDCWD, file, flags, mode);                                                                   \
    }
#define OPENER_AT(name)                                                                                                \
    int name(int dirfd, const char *file, int flags, ...) {                                                            \
        MODE(flags)                                                                                                    \
        if (!busy()) return (int)syscall(SYS_openat, dirfd, file, flags, mode);                                        \
        return do_open(dirfd, file, flags, mode);                                                                      \
    }
OPENER(open)
OPENER(open64)
OPENER_AT(openat)
OPENER_AT(openat64)

/* A position of -1: where the descriptor stands, or the end of a file that is appended to. */
static ssize_t do_write(int fd, const void *data, size_t size, int64_t at) {
    LOOK(WRITE, fd, NULL)
    if (cut) size /= 2;
    long log = record_begin(path, NULL);
    ssize_t done = at < 0 ? syscall(SYS_write, fd, data, size) : syscall(SYS_pwrite64, fd, data, size, at);
    int64_t begun = at < 0 && log >= 0 && done >= 0 ? lseek(fd, 0, SEEK_CUR) - done : at;
    record_end(log, WRITE, done, fd, 0, begun, path, NULL, data, done > 0 ? (size_t)done : 0);
    return done;
}

ssize_t write(int fd, const void *data, size_t size) {
    return busy() ? do_write(fd, data, size, -1) : syscall(SYS_write, fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    return busy() ? do_write(fd, data, size, at) : syscall(SYS_pwrite64, fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    return busy() ? do_write(fd, data, size, at) : syscall(SYS_pwrite64, fd, data, size, at);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    if (!busy()) return syscall(SYS_writev, fd, parts, count);
    ssize_t total = 0;
    for (int i = 0; i < count; i++) {
        ssize_t done = do_write(fd, parts[i].iov_base, parts[i].iov_len, -1);
        if (done < 0) return total ? total : -1;
        total += done;
        if ((size_t)done < parts[i].iov_len) break;
    }
    return total;
}

/* Copies inside of the kernel are done as reads and writes, so that they are counted and written down like any other. */
static ssize_t copy(int from, off64_t *from_at, int to, off64_t *to_at, size_t size) {
    static __thread char block[1 << 16];
    size_t want = size < sizeof block ? size : sizeof block;
    ssize_t got = from_at ? syscall(SYS_pread64, from, block, want, *from_at) : syscall(SYS_read, from, block, want);
    if (got <= 0) return got;
    ssize_t done = do_write(to, block, (size_t)got, to_at ? *to_at : -1);
    if (done > 0 && from_at) *from_at += done;
    if (done > 0 && to_at) *to_at += done;
    if (!from_at && done < got) lseek(from, (done > 0 ? done : 0) - got, SEEK_CUR);
    return done;
}
ssize_t sendfile64(int to, int from, off64_t *at, size_t size) {
    return busy() ? copy(from, at, to, NULL, size) : syscall(SYS_sendfile, to, from, at, size);
}
ssize_t sendfile(int to, int from, off_t *at, size_t size) { return sendfile64(to, from, at, size); }
ssize_t copy_file_range(int from, off64_t *from_at, int to, off64_t *to_at, size_t size, unsigned flags) {
    return busy() ? copy(from, from_at, to, to_at, size)
                  : syscall(SYS_copy_file_range, from, from_at, to, to_at, size, flags);
}

static ssize_t do_read(int fd, void *data, size_t size, int64_t at) {
    LOOK(READ, fd, NULL)
    if (cut) size = size > 1 ? size / 2 : size;
    return at < 0 ? syscall(SYS_read, fd, data, size) : syscall(SYS_pread64, fd, data, size, at);
}
ssize_t read(int fd, void *data, size_t size) {
    return busy() ? do_read(fd, data, size, -1) : syscall(SYS_read, fd, data, size);
}
ssize_t pread(int fd, void *data, size_t size, off_t at) {
    return busy() ? do_read(fd, data, size, at) : syscall(SYS_pread64, fd, data, size, at);
}
ssize_t pread64(int fd, void *data, size_t size, off64_t at) {
    return busy() ? do_read(fd, data, size, at) : syscall(SYS_pread64, fd, data, size, at);
}

static int do_sync(int fd, long number) {
    LOOK(FSYNC, fd, NULL)
    long log = record_begin(path, NULL);
    int result = (int)syscall(number, fd);
    record_end(log, FSYNC, result, fd, 0, 0, path, NULL, NULL, 0);
    return result;
}
int fsync(int fd) { return busy() ? do_sync(fd, SYS_fsync) : (int)syscall(SYS_fsync, fd); }
int fdatasync(int fd) { return busy() ? do_sync(fd, SYS_fdatasync) : (int)syscall(SYS_fdatasync, fd); }

static int do_pair(int op, int from_fd, const char *from, int to_fd, const char *to, int flags) {
    char path[PATH_MAX], path2[PATH_MAX];
    absolute(from_fd, from, path);
    absolute(to_fd, to, path2);
    if (busy() && hit(op, path, path2, NULL)) return -1;
    long log = busy() ? record_begin(path, path2) : -1;
    int result = op == RENAME ? (int)syscall(SYS_renameat2, from_fd, from, to_fd, to, flags)
                              : (int)syscall(SYS_linkat, from_fd, from, to_fd, to, flags);
    record_end(log, op, result, -1, flags, 0, path, path2, NULL, 0);
    return result;
}
int rename(const char *from, const char *to) { return do_pair(RENAME, AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int a, const char *from, int b, const char *to) { return do_pair(RENAME, a, from, b, to, 0); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    return do_pair(RENAME, a, from, b, to, (int)flags);
}
int link(const char *from, const char *to) { return do_pair(LINK, AT_FDCWD, from, AT_FDCWD, to, 0); }
int linkat(int a, const char *from, int b, const char *to, int flags) { return do_pair(LINK, a, from, b, to, flags); }

static int do_name(int op, int dirfd, const char *name, int mode) {
    LOOK(op, dirfd, name)
    long log = record_begin(path, NULL);
    int result = op == MKDIR    ? (int)syscall(SYS_mkdirat, dirfd, name, mode)
                 : op == RMDIR  ? (int)syscall(SYS_unlinkat, dirfd, name, AT_REMOVEDIR)
                                : (int)syscall(SYS_unlinkat, dirfd, name, 0);
    record_end(log, op, result, -1, 0, 0, path, NULL, NULL, 0);
    return result;
}
int unlink(const char *name) {
    return busy() ? do_name(UNLINK, AT_FDCWD, name, 0) : (int)syscall(SYS_unlinkat, AT_FDCWD, name, 0);
}
int rmdir(const char *name) {
    return busy() ? do_name(RMDIR, AT_FDCWD, name, 0) : (int)syscall(SYS_unlinkat, AT_FDCWD, name, AT_REMOVEDIR);
}
int unlinkat(int dirfd, const char *name, int flags) {
    return busy() ? do_name(flags & AT_REMOVEDIR ? RMDIR : UNLINK, dirfd, name, 0)
                  : (int)syscall(SYS_unlinkat, dirfd, name, flags);
}
int mkdir(const char *name, mode_t mode) {
    return busy() ? do_name(MKDIR, AT_FDCWD, name, (int)mode) : (int)syscall(SYS_mkdirat, AT_FDCWD, name, mode);
}
int mkdirat(int dirfd, const char *name, mode_t mode) {
    return busy() ? do_name(MKDIR, dirfd, name, (int)mode) : (int)syscall(SYS_mkdirat, dirfd, name, mode);
}

static int do_truncate(int fd, const char *name, off64_t size) {
    LOOK(TRUNCATE, name ? AT_FDCWD : fd, name)
    long log = record_begin(path, NULL);
    int result = name ? (int)syscall(SYS_truncate, name, size) : (int)syscall(SYS_ftruncate, fd, size);
    record_end(log, TRUNCATE, result, name ? -1 : fd, 0, size, path, NULL, NULL, 0);
    return result;
}
int ftruncate(int fd, off_t size) { return busy() ? do_truncate(fd, NULL, size) : (int)syscall(SYS_ftruncate, fd, size); }
int ftruncate64(int fd, off64_t size) { return ftruncate(fd, size); }
int truncate(const char *name, off_t size) {
    return busy() ? do_truncate(-1, name, size) : (int)syscall(SYS_truncate, name, size);
}
int truncate64(const char *name, off64_t size) { return truncate(name, size); }

static int do_stat(int dirfd, const char *name, struct stat *out, int flags) {
    LOOK(STAT, dirfd, name && *name ? name : NULL)
    return (int)syscall(SYS_newfstatat, dirfd, name, out, flags);
}
#define STATER(function, kind, flag)                                                                                   \
    int function(const char *name, kind *out) {                                                                        \
        return busy() ? do_stat(AT_FDCWD, name, (struct stat *)out, flag)                                              \
                      : (int)syscall(SYS_newfstatat, AT_FDCWD, name, out, flag);                                       \
    }
STATER(stat, struct stat, 0)
STATER(stat64, struct stat64, 0)
STATER(lstat, struct stat, AT_SYMLINK_NOFOLLOW)
STATER(lstat64, struct stat64, AT_SYMLINK_NOFOLLOW)
int fstatat(int dirfd, const char *name, struct stat *out, int flags) {
    return busy() ? do_stat(dirfd, name, out, flags) : (int)syscall(SYS_newfstatat, dirfd, name, out, flags);
}
int fstatat64(int dirfd, const char *name, struct stat64 *out, int flags) {
    return fstatat(dirfd, name, (struct stat *)out, flags);
}

/* What programs call that were built against a glibc older than 2.33. */
int __xstat(int version, const char *name, struct stat *out) { return (void)version, stat(name, out); }
int __xstat64(int version, const char *name, struct stat64 *out) { return (void)version, stat64(name, out); }
int __lxstat(int version, const char *name, struct stat *out) { return (void)version, lstat(name, out); }
int __lxstat64(int version, const char *name, struct stat64 *out) { return (void)version, lstat64(name, out); }
int __fxstatat(int version, int dirfd, const char *name, struct stat *out, int flags) {
    return (void)version, fstatat(dirfd, name, out, flags);
}
int __fxstatat64(int version, int dirfd, const char *name, struct stat64 *out, int flags) {
    return (void)version, fstatat64(dirfd, name, out, flags);
}

DIR *opendir(const char *name) {
    if (busy()) {
        char path[PATH_MAX];
        absolute(AT_FDCWD, name, path);
        if (hit(LIST, path, NULL, NULL)) return NULL;
    }
    return REAL(opendir)(name);
}
DIR *fdopendir(int fd) {
    if (busy()) {
        char path[PATH_MAX];
        absolute(fd, NULL, path);
        if (hit(LIST, path, NULL, NULL)) return NULL;
    }
    return REAL(fdopendir)(fd);
}

void *mmap64(void *at, size_t size, int protection, int flags, int fd, off64_t offset) {
    if (fd >= 0 && busy()) {
        char path[PATH_MAX];
        absolute(fd, NULL, path);
        if (hit(MMAP, path, NULL, NULL)) return MAP_FAILED;
    }
    return (void *)syscall(SYS_mmap, at, size, protection, flags, fd, offset);
}
void *mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset) {
    return mmap64(at, size, protection, flags, fd, offset);
}

/* Free space as a test says; what lies on the disk is not touched. */
static int say_free(const char *path, struct statvfs *out, int result) {
    if (result == 0 && control && control->free_bytes >= 0 && strncmp(path, control->path, strlen(control->path)) == 0)
        out->f_bfree = out->f_bavail = (fsblkcnt_t)((uint64_t)control->free_bytes / (out->f_frsize ? out->f_frsize : 1));
    return result;
}
int statvfs(const char *name, struct statvfs *out) {
    char path[PATH_MAX];
    absolute(AT_FDCWD, name, path);
    return say_free(path, out, REAL(statvfs)(name, out));
}
int statvfs64(const char *name, struct statvfs64 *out) { return statvfs(name, (struct statvfs *)out); }

static int64_t offset_ns(void) { return control ? control->clock_offset_ns : 0; }

int clock_gettime(clockid_t clock, struct timespec *out) {
    int result = (int)syscall(SYS_clock_gettime, clock, out);
    int64_t offset = offset_ns();
    if (result == 0 && offset && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        int64_t now = (int64_t)out->tv_sec * 1000000000 + out->tv_nsec + offset;
        out->tv_sec = now / 1000000000;
        out->tv_nsec = now % 1000000000;
    }
    return result;
}
int gettimeofday(struct timeval *restrict out, void *restrict zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    out->tv_sec = now.tv_sec;
    out->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
