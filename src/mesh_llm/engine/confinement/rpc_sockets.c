/* Preloaded into an RPC server and into the engine that is its client. llama.cpp itself is not changed.
 *
 * ggml's RPC server listens on TCP only, where every user of the machine can connect. With this library:
 *
 *   MESH_LLM_RPC_LISTEN=PATH        bind() to an IPv4 address makes a Unix socket at PATH instead.
 *   MESH_LLM_RPC_CONNECT=N=PATH...  connect() to 127.0.0.1:N goes to the Unix socket at PATH instead; one a line.
 *   MESH_LLM_RPC_FILTER=HEX         at the first accept() the process confines itself: a seccomp filter (struct
 *                                   sock_filter[], in hexadecimal) for all threads, and on macOS a sandbox profile.
 *   MESH_LLM_RPC_LANDLOCK=FD        before that, the Landlock rules behind this descriptor for the serving thread.
 *
 * The first accept() is the last moment before anything from outside is read: libraries and devices are loaded by
 * then. A process that cannot confine itself ends. Without these variables nothing changes.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#ifdef __linux__
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#ifndef SYS_landlock_restrict_self
#define SYS_landlock_restrict_self 446
#endif
#define HOOK(name) name
static int real_bind(int fd, const struct sockaddr *address, socklen_t size) {
    return (int)syscall(SYS_bind, fd, address, size);
}
static int real_connect(int fd, const struct sockaddr *address, socklen_t size) {
    return (int)syscall(SYS_connect, fd, address, size);
}
static int real_accept4(int fd, struct sockaddr *address, socklen_t *size, int flags) {
    return (int)syscall(SYS_accept4, fd, address, size, flags);
}
static int real_setsockopt(int fd, int level, int name, const void *value, socklen_t size) {
    return (int)syscall(SYS_setsockopt, fd, level, name, value, size);
}
#else
#define HOOK(name) mesh_##name
#define real_bind bind
#define real_connect connect
#define real_setsockopt setsockopt
#endif

static const int FAILED = 125;

static void give_up(const char *what) {
    fprintf(stderr, "error: the RPC server cannot be confined: %s: %s\n", what, strerror(errno));
    _exit(FAILED);
}

/* Puts a Unix socket in the place of `fd`, keeping close-on-exec off or on as `socket` made it. */
static int become_unix(int fd, const char *path, struct sockaddr_un *address) {
    memset(address, 0, sizeof *address);
    address->sun_family = AF_UNIX;
    if (strlen(path) >= sizeof address->sun_path) {
        errno = ENAMETOOLONG;
        return -1;
    }
    strcpy(address->sun_path, path);
    int made = socket(AF_UNIX, SOCK_STREAM, 0);
    if (made < 0) return -1;
    int moved = dup2(made, fd);
    close(made);
    return moved < 0 ? -1 : 0;
}

/* The Unix socket that stands for 127.0.0.1:port; NULL where there is none. */
static const char *path_of(unsigned port) {
    static char path[sizeof((struct sockaddr_un *)0)->sun_path];
    const char *next = getenv("MESH_LLM_RPC_CONNECT");
    while (next != NULL && *next != '\0') {
        char *end;
        unsigned long number = strtoul(next, &end, 10);
        if (*end != '=') return NULL;
        const char *from = end + 1;
        size_t length = strcspn(from, "\n");
        if (number == port && length < sizeof path) {
            memcpy(path, from, length);
            path[length] = '\0';
            return path;
        }
        next = from[length] == '\n' ? from + length + 1 : NULL;
    }
    return NULL;
}

int HOOK(bind)(int fd, const struct sockaddr *address, socklen_t size) {
    const char *path = getenv("MESH_LLM_RPC_LISTEN");
    struct sockaddr_un un;
    if (path == NULL || address->sa_family != AF_INET) return real_bind(fd, address, size);
    if (become_unix(fd, path, &un) != 0) return -1;
    return real_bind(fd, (struct sockaddr *)&un, sizeof un);
}

int HOOK(connect)(int fd, const struct sockaddr *address, socklen_t size) {
    struct sockaddr_un un;
    if (address->sa_family == AF_INET && size >= sizeof(struct sockaddr_in)) {
        const struct sockaddr_in *in = (const struct sockaddr_in *)address;
        if (in->sin_addr.s_addr == htonl(INADDR_LOOPBACK)) {
            const char *path = path_of(ntohs(in->sin_port));
            if (path != NULL) {
                if (become_unix(fd, path, &un) != 0) return -1;
                return real_connect(fd, (struct sockaddr *)&un, sizeof un);
            }
        }
    }
    return real_connect(fd, address, size);
}

/* A Unix socket has no TCP options and needs none: TCP_NODELAY is set, and its failure is an error, in llama.cpp. */
int HOOK(setsockopt)(int fd, int level, int name, const void *value, socklen_t size) {
    int done = real_setsockopt(fd, level, name, value, size);
    return done != 0 && level == IPPROTO_TCP && (errno == EOPNOTSUPP || errno == EPERM) ? 0 : done;
}

#ifdef __linux__
static void confine(const char *hex) {
    size_t length = strlen(hex) / 2;
    unsigned char *bytes = malloc(length + sizeof(struct sock_filter));
    if (bytes == NULL || length % sizeof(struct sock_filter) != 0) give_up("the filter");
    for (size_t i = 0; i < length; i++) {
        unsigned value;
        if (sscanf(hex + 2 * i, "%2x", &value) != 1) give_up("the filter");
        bytes[i] = (unsigned char)value;
    }
    struct sock_fprog program = {(unsigned short)(length / sizeof(struct sock_filter)), (struct sock_filter *)bytes};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) give_up("no_new_privs");
    if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0) give_up("dumpable");
    const char *rules = getenv("MESH_LLM_RPC_LANDLOCK");
    if (rules != NULL) {
        int fd = atoi(rules);
        if (syscall(SYS_landlock_restrict_self, fd, 0) != 0) give_up("Landlock");
        close(fd);
    }
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program) != 0) give_up("seccomp");
}
#else
int sandbox_init(const char *profile, uint64_t flags, char **error);
static void confine(const char *profile) {
    char *error = NULL;
    if (sandbox_init(profile, 0, &error) != 0) give_up(error != NULL ? error : "sandbox");
}
#endif

static void confine_once(void) {
    static int done;
    const char *filter = getenv("MESH_LLM_RPC_FILTER");
    if (filter != NULL && !__atomic_exchange_n(&done, 1, __ATOMIC_SEQ_CST)) confine(filter);
}

int HOOK(accept)(int fd, struct sockaddr *address, socklen_t *size) {
    confine_once();
#ifdef __linux__
    return real_accept4(fd, address, size, 0);
#else
    return accept(fd, address, size);
#endif
}

#ifdef __linux__
int accept4(int fd, struct sockaddr *address, socklen_t *size, int flags) {
    confine_once();
    return real_accept4(fd, address, size, flags);
}
#else
#define INTERPOSE(name)                                                                                  \
    __attribute__((used, section("__DATA,__interpose"))) static const struct {                          \
        const void *ours, *theirs;                                                                       \
    } interpose_##name = {(const void *)mesh_##name, (const void *)name};
INTERPOSE(bind)
INTERPOSE(connect)
INTERPOSE(accept)
INTERPOSE(setsockopt)
#endif
