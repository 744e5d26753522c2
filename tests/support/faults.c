/* Fails the n-th system call on files under a directory, or ends the process just before it.
 *
 * A seccomp filter sends such calls of this process and its threads to a handler of SIGSYS, which
 * counts those that concern the directory and makes all but one of them through `gate`, the one
 * place that the filter lets through. Unlike a library that stands before libc, it sees the calls
 * that Rust's rustix makes without libc. Linux on x86-64 and AArch64. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

long gate(long number, long a, long b, long c, long d, long e, long f);
extern char gate_end[];

#if defined(__x86_64__)
#define ARCH AUDIT_ARCH_X86_64
__asm__(".text\n.globl gate\n.type gate, @function\ngate:\n"
        "mov %rdi, %rax\nmov %rsi, %rdi\nmov %rdx, %rsi\nmov %rcx, %rdx\n"
        "mov %r8, %r10\nmov %r9, %r8\nmov 8(%rsp), %r9\nsyscall\n"
        ".globl gate_end\ngate_end:\nret\n");
#define ARGUMENTS(m) \
    {m->gregs[REG_RDI], m->gregs[REG_RSI], m->gregs[REG_RDX], \
     m->gregs[REG_R10], m->gregs[REG_R8],  m->gregs[REG_R9]}
#define RESULT(m) m->gregs[REG_RAX]
#elif defined(__aarch64__)
#define ARCH AUDIT_ARCH_AARCH64
__asm__(".text\n.globl gate\n.type gate, @function\ngate:\n"
        "mov x8, x0\nmov x0, x1\nmov x1, x2\nmov x2, x3\nmov x3, x4\nmov x4, x5\nmov x5, x6\n"
        "svc #0\n.globl gate_end\ngate_end:\nret\n");
#define ARGUMENTS(m) \
    {(long)m->regs[0], (long)m->regs[1], (long)m->regs[2], \
     (long)m->regs[3], (long)m->regs[4], (long)m->regs[5]}
#define RESULT(m) m->regs[0]
#else
#error "only x86-64 and AArch64"
#endif

/* Which arguments say what a call is about: a descriptor, a path, or a path below a descriptor. */
struct call {
    int number;
    signed char descriptor, path, descriptor2, path2;
};
static const struct call calls[] = {
#ifdef SYS_open
    {SYS_open, -1, 0, -1, -1},      {SYS_stat, -1, 0, -1, -1},     {SYS_lstat, -1, 0, -1, -1},
    {SYS_access, -1, 0, -1, -1},    {SYS_readlink, -1, 0, -1, -1}, {SYS_mkdir, -1, 0, -1, -1},
    {SYS_rmdir, -1, 0, -1, -1},     {SYS_unlink, -1, 0, -1, -1},   {SYS_rename, -1, 0, -1, 1},
    {SYS_link, -1, 0, -1, 1},
#endif
#ifdef SYS_renameat
    {SYS_renameat, 0, 1, 2, 3},
#endif
#ifdef SYS_faccessat2
    {SYS_faccessat2, 0, 1, -1, -1},
#endif
    {SYS_openat, 0, 1, -1, -1},     {SYS_newfstatat, 0, 1, -1, -1}, {SYS_statx, 0, 1, -1, -1},
    {SYS_faccessat, 0, 1, -1, -1},  {SYS_readlinkat, 0, 1, -1, -1}, {SYS_mkdirat, 0, 1, -1, -1},
    {SYS_unlinkat, 0, 1, -1, -1},   {SYS_renameat2, 0, 1, 2, 3},    {SYS_linkat, 0, 1, 2, 3},
    {SYS_statfs, -1, 0, -1, -1},    {SYS_truncate, -1, 0, -1, -1},  {SYS_fstat, 0, -1, -1, -1},
    {SYS_fstatfs, 0, -1, -1, -1},   {SYS_read, 0, -1, -1, -1},      {SYS_readv, 0, -1, -1, -1},
    {SYS_pread64, 0, -1, -1, -1},   {SYS_preadv2, 0, -1, -1, -1},   {SYS_write, 0, -1, -1, -1},
    {SYS_writev, 0, -1, -1, -1},    {SYS_pwrite64, 0, -1, -1, -1},  {SYS_fsync, 0, -1, -1, -1},
    {SYS_fdatasync, 0, -1, -1, -1}, {SYS_ftruncate, 0, -1, -1, -1}, {SYS_fallocate, 0, -1, -1, -1},
    {SYS_fadvise64, 0, -1, -1, -1}, {SYS_flock, 0, -1, -1, -1},     {SYS_getdents64, 0, -1, -1, -1},
    {SYS_lseek, 0, -1, -1, -1},     {SYS_ioctl, 0, -1, -1, -1},     {SYS_fcntl, 0, -1, -1, -1},
    {SYS_close, 0, -1, -1, -1},     {SYS_mmap, 4, -1, -1, -1},
};
enum { CALLS = sizeof calls / sizeof *calls };

static char root[4096];
static size_t root_length;
static long chosen, seen;
static int failure, last_number;

static int is_inside(const char *path) {
    return strncmp(path, root, root_length) == 0 &&
           (path[root_length] == 0 || path[root_length] == '/');
}

static int is_open_inside(long descriptor) {
    char link[32] = "/proc/self/fd/", path[4096], digits[12];
    int length = 0, at = 14;
    if (descriptor < 0) return 0;
    do digits[length++] = '0' + descriptor % 10;
    while (descriptor /= 10);
    while (length) link[at++] = digits[--length];
    link[at] = 0;
    long found = gate(SYS_readlinkat, AT_FDCWD, (long)link, (long)path, sizeof path - 1, 0, 0);
    if (found < 0) return 0;
    path[found] = 0;
    return is_inside(path);
}

static int is_directory(int descriptor) {
    struct stat found;
    return gate(SYS_fstat, descriptor, (long)&found, 0, 0, 0, 0) == 0 && S_ISDIR(found.st_mode);
}

static int concerns(int descriptor, int path, const long *arguments) {
    if (path >= 0) {
        const char *text = (const char *)arguments[path];
        if (text && text[0] == '/') return is_inside(text);
    }
    return descriptor >= 0 && is_open_inside((int)arguments[descriptor]);
}

static long answer(int number, const long *a) {
    for (int at = 0; at < CALLS; at++) {
        const struct call *call = &calls[at];
        if (call->number != number) continue;
        if (!concerns(call->descriptor, call->path, a) &&
            !concerns(call->descriptor2, call->path2, a))
            break;
        /* Rust's own library takes for granted that a directory can be closed. */
        if (number == SYS_close && is_directory((int)a[0])) break;
        if (__atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST) != chosen) break;
        last_number = number;
        if (!failure) gate(SYS_kill, gate(SYS_getpid, 0, 0, 0, 0, 0, 0), SIGKILL, 0, 0, 0, 0);
        /* What cannot be closed is closed all the same. */
        if (number == SYS_close) gate(number, a[0], 0, 0, 0, 0, 0);
        return -failure;
    }
    return gate(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

static void on_call(int signal, siginfo_t *info, void *context) {
    (void)signal;
    mcontext_t *machine = &((ucontext_t *)context)->uc_mcontext;
    const long arguments[] = ARGUMENTS(machine);
    RESULT(machine) = answer(info->si_syscall, arguments);
}

/* How many calls concerned the directory, and the number of the one that failed. */
long faults_seen(void) { return seen; }
int faults_failed(void) { return last_number; }

/* Fail call number `at`, from 1 on, with `error`; with 0, end the process there. 0 on success. */
int faults_start(const char *directory, long at, int error) {
    struct sock_filter filter[2 * CALLS + 16];
    int length = 0;
    const uint64_t end = (uint64_t)(uintptr_t)gate_end;
    root_length = strlen(directory);
    if (root_length >= sizeof root) return ENAMETOOLONG;
    memcpy(root, directory, root_length + 1);
    chosen = at, failure = error;
#define PUT(...) filter[length++] = (struct sock_filter)__VA_ARGS__
#define LOAD(field, half) \
    PUT(BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field) + (half)))
    LOAD(arch, 0);
    PUT(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCH, 1, 0));
    PUT(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
    LOAD(instruction_pointer, 0);
    PUT(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)end, 0, 3));
    LOAD(instruction_pointer, 4);
    PUT(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)(end >> 32), 0, 1));
    PUT(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
    LOAD(nr, 0);
    for (int at = 0; at < CALLS; at++) {
        PUT(BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)calls[at].number, 0, 1));
        PUT(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP));
    }
    PUT(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
    struct sigaction action = {.sa_sigaction = on_call, .sa_flags = SA_SIGINFO};
    struct sock_fprog program = {length, filter};
    if (sigaction(SIGSYS, &action, NULL) || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return errno;
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) ? errno : 0;
}
