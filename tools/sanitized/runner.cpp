// Serves ggml's RPC protocol over a pipe, with the pinned rpc-server's own code, built with sanitizers.
//
// For tests/oracle: it sends the frames that the firewall accepted. Nothing here checks them. A sanitizer's report, an
// abort or a signal ends the process, and its standard error says why.
//
// What comes on standard input, per connection: u8 threads, then chunks `u32 size | bytes` of the RPC stream; a chunk
// of size 0 ends the stream. What goes to standard output: the replies as the rpc-server sends them, and at the end of
// a connection u64 ~0, u8 whether the server itself closed it, u64 how many graphs it computed so far. Where the server
// closes it, that comes at once, and what is left of the stream is thrown away.
//
// Tensor buffers and the graph's work buffer are placed in an arena of their own: each lies at the start of a slot of
// 4 GiB of which nothing else is mapped, and the rest of its last page is poisoned. A heap's red zone is a few hundred
// bytes wide, and an access by a hostile stride goes much further.

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

// The server's request loop is a static function of this file.
#include "ggml-rpc.cpp"  // NOLINT

#include "ggml-cpu.h"

namespace {

constexpr uint64_t SLOT = 4ull << 30;
constexpr uint64_t SLOTS = 4096;
constexpr uint64_t LEAD = 1ull << 30;  // free address space before a slot's buffer
constexpr uint64_t PAGE = 4096;
char * const ARENA = (char *) 0x200000000000ull;  // inside of what AddressSanitizer calls high memory

[[noreturn]] void fail(const char * what) {
    fprintf(stderr, "runner: %s: %s\n", what, strerror(errno));
    _exit(3);
}

// One mapping per live buffer. Slots are used in turn, so a buffer's addresses stay empty long after it was freed.
struct Arena {
    Arena() {
        void * at = mmap(ARENA, SLOT * SLOTS, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
        if (at != ARENA) {
            fail("the arena's addresses are taken");
        }
    }

    void * take(size_t size, size_t misalign) {
        std::lock_guard<std::mutex> lock(mutex);
        const size_t mapped = (size + misalign + PAGE - 1) / PAGE * PAGE;
        if (size == 0 || mapped > SLOT - 2 * LEAD) {
            return nullptr;
        }
        char * start = nullptr;
        for (uint64_t tried = 0; tried < SLOTS && start == nullptr; tried++) {
            next = (next + 1) % SLOTS;
            char * candidate = ARENA + next * SLOT + LEAD;
            if (live.find(candidate + misalign) == live.end()) {
                start = candidate;
            }
        }
        if (start == nullptr) {
            return nullptr;
        }
        if (mmap(start, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) != start) {
            return nullptr;
        }
        __asan_unpoison_memory_region(start, mapped);
        // What a real allocation holds is what was there before: not zeros.
        memset(start, 0xa5, mapped < (1 << 20) ? mapped : (1 << 20));
        __asan_poison_memory_region(start, misalign);
        __asan_poison_memory_region(start + misalign + size, mapped - misalign - size);
        live[start + misalign] = { start, mapped };
        return start + misalign;
    }

    bool give_back(void * buffer) {
        std::lock_guard<std::mutex> lock(mutex);
        auto found = live.find((char *) buffer);
        if (found == live.end()) {
            return false;
        }
        auto [start, mapped] = found->second;
        __asan_unpoison_memory_region(start, mapped);
        if (mmap(start, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) != start) {
            fail("a buffer cannot be unmapped");
        }
        live.erase(found);
        return true;
    }

    std::mutex mutex;
    uint64_t next = 0;
    std::unordered_map<char *, std::pair<char *, size_t>> live;
};

Arena & arena() {
    static Arena one;
    return one;
}

uint64_t graphs = 0;

// Standard input and output, read and written in as few calls as can be.
struct Pipe {
    bool read_exact(void * into, size_t size) {
        char * out = (char *) into;
        while (size > 0) {
            if (at == held) {
                flush();
                const ssize_t got = read(STDIN_FILENO, in, sizeof(in));
                if (got <= 0) {
                    return false;
                }
                at = 0;
                held = (size_t) got;
            }
            const size_t part = std::min(size, held - at);
            memcpy(out, in + at, part);
            at += part;
            out += part;
            size -= part;
        }
        return true;
    }

    void put(const void * data, size_t size) { out.append((const char *) data, size); }

    void flush() {
        for (size_t done = 0; done < out.size();) {
            const ssize_t n = write(STDOUT_FILENO, out.data() + done, out.size() - done);
            if (n <= 0) {
                _exit(0);  // nobody reads any more
            }
            done += (size_t) n;
        }
        out.clear();
    }

    char in[256 * 1024];
    size_t at = 0;
    size_t held = 0;
    std::string out;
};

Pipe pipe_;
uint32_t chunk_left = 0;
bool stream_ended = false;

bool stream_read(void * into, size_t size) {
    char * out = (char *) into;
    while (size > 0) {
        if (chunk_left == 0) {
            if (stream_ended || !pipe_.read_exact(&chunk_left, sizeof(chunk_left))) {
                return false;
            }
            if (chunk_left == 0) {
                stream_ended = true;
                return false;
            }
        }
        const size_t part = std::min<size_t>(size, chunk_left);
        if (!pipe_.read_exact(out, part)) {
            return false;
        }
        out += part;
        size -= part;
        chunk_left -= (uint32_t) part;
    }
    return true;
}

}  // namespace

// The transport that the server's loop uses, instead of sockets.
struct socket_t::impl {};
socket_t::socket_t(std::unique_ptr<impl> p) : pimpl(std::move(p)) {}
socket_t::~socket_t() = default;
bool socket_t::send_data(const void * data, size_t size) {
    pipe_.put(data, size);
    return true;
}
bool socket_t::recv_data(void * data, size_t size) { return stream_read(data, size); }
bool socket_t::flush() { return true; }
socket_ptr socket_t::accept() { return nullptr; }
void socket_t::get_caps(uint8_t * caps) { memset(caps, 0, RPC_CONN_CAPS_SIZE); }
void socket_t::update_caps(const uint8_t *) {}
socket_ptr socket_t::create_server(const char *, int) { return nullptr; }
// Never called otherwise: the one place outside of the class that may make one.
socket_ptr socket_t::connect(const char *, int) { return socket_ptr(new socket_t(std::make_unique<impl>())); }
bool rpc_transport_init() { return true; }
void rpc_transport_shutdown() {}

extern "C" {

// Every tensor buffer of the processor backend comes from here (ggml-backend.cpp); ggml's own contexts do not.
void * __wrap_ggml_aligned_malloc(size_t size) { return arena().take(size, 0); }

void __real_ggml_aligned_free(void * ptr, size_t size);
void __wrap_ggml_aligned_free(void * ptr, size_t size) {
    if (!arena().give_back(ptr)) {
        __real_ggml_aligned_free(ptr, size);
    }
}

// The backend keeps its work buffer and lets it only grow, so that a graph that writes behind its own work size would
// write into what an earlier graph needed. Here each graph gets exactly what its plan says, aligned as `new` aligns.
enum ggml_status __real_ggml_graph_compute(struct ggml_cgraph * graph, struct ggml_cplan * plan);
enum ggml_status __wrap_ggml_graph_compute(struct ggml_cgraph * graph, struct ggml_cplan * plan) {
    void * work = plan->work_size > 0 ? arena().take(plan->work_size, 16) : nullptr;
    if (plan->work_size > 0 && work == nullptr) {
        return GGML_STATUS_ALLOC_FAILED;
    }
    plan->work_data = (uint8_t *) work;
    const enum ggml_status status = __real_ggml_graph_compute(graph, plan);
    if (work != nullptr) {
        arena().give_back(work);
    }
    graphs++;
    return status;
}

}  // extern "C"

int main() {
    uint8_t threads;
    while (pipe_.read_exact(&threads, 1)) {
        ggml_backend_t backend = ggml_backend_cpu_init();
        ggml_backend_cpu_set_n_threads(backend, threads);
        chunk_left = 0;
        stream_ended = false;
        rpc_serve_client({ backend }, nullptr, socket_t::connect("", 0));
        const uint8_t closed = !stream_ended;
        ggml_backend_free(backend);
        const uint64_t mark = ~0ull;
        pipe_.put(&mark, sizeof(mark));
        pipe_.put(&closed, sizeof(closed));
        pipe_.put(&graphs, sizeof(graphs));
        pipe_.flush();
        for (char rest; !stream_ended;) {
            if (!stream_read(&rest, 1) && !stream_ended) {
                return 0;
            }
        }
    }
    return 0;
}
