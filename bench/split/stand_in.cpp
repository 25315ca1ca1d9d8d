// A plugin of ggml that makes the processor's device take a set time for a graph instead of computing it. It registers
// no device of its own: whoever loads it, llama-server or an rpc-server, asks and answers exactly as with the real one.
//
// What a graph takes: for each matrix of weights that it multiplies by, the bytes of the matrix at STAND_IN_BYTES a
// second, once (the fixed part), and its elements for each token at STAND_IN_PRODUCTS a second. Matrices of the output
// layer take nothing. Attention takes nothing, so a long context costs no more than a short one.
// STAND_IN_MACHINE names a file of 8 bytes, shared by all engines of one machine: the time at which it is free again.
// So two engines of one machine wait for each other. Results are numbers that mean nothing, always the same ones. They do
// not compress, as a model's activations do not.

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#include <unordered_set>

#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"

static double bytes_per_ns, products_per_ns;
static std::atomic<int64_t> alone{0};
static std::atomic<int64_t> * free_at = &alone;
static ggml_backend_t (*start_processor)(ggml_backend_dev_t, const char *);

static int64_t now_ns() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ll + time.tv_nsec;
}

// A matrix of a block, as llama.cpp names it: "blk.3.attn_q.weight".
static bool is_weight(const ggml_tensor * tensor) {
    return strncmp(tensor->name, "blk.", 4) == 0 && strstr(tensor->name, ".weight") != nullptr;
}

static int64_t cost_ns(const ggml_cgraph * graph) {
    double total = 0;
    for (int i = 0; i < graph->n_nodes; i++) {
        const ggml_tensor * node = graph->nodes[i];
        bool experts = node->op == GGML_OP_MUL_MAT_ID;
        if ((node->op != GGML_OP_MUL_MAT && !experts) || !is_weight(node->src[0])) {
            continue;
        }
        double rows = double(ggml_nelements(node)) / node->ne[0];
        double elements = double(node->src[0]->ne[0]) * node->src[0]->ne[1];
        double all = double(node->src[0]->ne[2]), read = experts && rows < all ? rows : all;
        if (rows > 0) {
            total += read * ggml_nbytes(node->src[0]) / all / bytes_per_ns + rows * elements / products_per_ns;
        }
    }
    return int64_t(total);
}

static float numbers[1 << 18];

static void make_numbers() {
    uint32_t state = 1;
    for (float & number : numbers) {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        number = float(state) / 4294967296.0f - 0.5f;
    }
}

static void fill(ggml_tensor * tensor) {
    char * target = static_cast<char *>(tensor->data);
    size_t left = ggml_nbytes(tensor);
    if (tensor->type != GGML_TYPE_F32) {
        memset(target, 0, left);
        return;
    }
    while (left > 0) {
        size_t part = left < sizeof(numbers) ? left : sizeof(numbers);
        memcpy(target, numbers, part);
        target += part;
        left -= part;
    }
}

// What may be read of a graph: what nothing in it uses, marked results, and sums, which the next machine's part adds to.
static void fill_results(ggml_cgraph * graph) {
    std::unordered_set<const ggml_tensor *> used;
    for (int i = 0; i < graph->n_nodes; i++) {
        for (const ggml_tensor * source : graph->nodes[i]->src) {
            if (source != nullptr) {
                used.insert(source->view_src != nullptr ? source->view_src : source);
            }
        }
    }
    for (int i = 0; i < graph->n_nodes; i++) {
        ggml_tensor * node = graph->nodes[i];
        bool read = node->op == GGML_OP_ADD || (node->flags & GGML_TENSOR_FLAG_OUTPUT) || used.count(node) == 0;
        if (read && node->view_src == nullptr && node->data != nullptr && ggml_is_contiguous(node)) {
            fill(node);
        }
    }
}

static ggml_status take_time(ggml_backend_t, ggml_cgraph * graph) {
    int64_t cost = cost_ns(graph), begun = now_ns(), before = free_at->load(), end;
    do {
        end = (before > begun ? before : begun) + cost;
    } while (cost > 0 && !free_at->compare_exchange_weak(before, end));
    fill_results(graph);
    timespec until = {time_t(end / 1000000000ll), long(end % 1000000000ll)};
    while (cost > 0 && clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, nullptr) != 0) {
    }
    return GGML_STATUS_SUCCESS;
}

static ggml_backend_t start(ggml_backend_dev_t device, const char * parameters) {
    ggml_backend_t backend = start_processor(device, parameters);
    if (backend != nullptr) {
        backend->iface.graph_compute = take_time;
        backend->iface.graph_plan_create = nullptr;
    }
    return backend;
}

static double setting(const char * name) {
    const char * text = getenv(name);
    double value = text == nullptr ? 0 : atof(text);
    if (!(value > 0)) {
        fprintf(stderr, "error: %s is not set\n", name);
        exit(1);
    }
    return value;
}

static void share_machine(const char * path) {
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    void * memory = MAP_FAILED;
    if (file >= 0 && ftruncate(file, sizeof(int64_t)) == 0) {
        memory = mmap(nullptr, sizeof(int64_t), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    }
    if (memory == MAP_FAILED) {
        perror(path);
        exit(1);
    }
    close(file);
    free_at = static_cast<std::atomic<int64_t> *>(memory);
}

static const char * registry_name(ggml_backend_reg_t) {
    return "StandIn";
}

static size_t no_devices(ggml_backend_reg_t) {
    return 0;
}

static ggml_backend_dev_t no_device(ggml_backend_reg_t, size_t) {
    return nullptr;
}

static void * no_procedure(ggml_backend_reg_t, const char *) {
    return nullptr;
}

static ggml_backend_reg_t stand_in() {
    static ggml_backend_reg registry = {
        GGML_BACKEND_API_VERSION, {registry_name, no_devices, no_device, no_procedure}, nullptr
    };
    if (start_processor == nullptr) {
        bytes_per_ns = setting("STAND_IN_BYTES") * 1e-9;
        products_per_ns = setting("STAND_IN_PRODUCTS") * 1e-9;
        make_numbers();
        if (const char * path = getenv("STAND_IN_MACHINE")) {
            share_machine(path);
        }
        ggml_backend_dev_t processor = ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0);
        start_processor = processor->iface.init_backend;
        processor->iface.init_backend = start;
    }
    return &registry;
}

GGML_BACKEND_DL_IMPL(stand_in)
