// A plugin of ggml whose device is the processor under another name: a GPU for tests, which can be broken on purpose.
// FAULT: 0 none, 1 crash at load, 2 crash at an operator, 3 hang at an operator, 4 wrong at one operator, 5 wrong at
// graphs as long as a model's, 6 its memory is as large as the processor's, and it gives 17 MiB of it, 7 there are two
// devices, and the first one crashes when it is used, 8 as 6, and it gives 1 MiB.

#include <cstdlib>
#include <cstring>
#include <unistd.h>

#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"

static const size_t number = FAULT == 7 ? 2 : 1;
static ggml_backend_device devices[2];
static ggml_status (*compute_on_processor)(ggml_backend_t, ggml_cgraph *);

static void spoil(ggml_tensor * tensor) {
    float value = 0;
    ggml_backend_tensor_get(tensor, &value, 0, sizeof(value));
    value += 100;
    ggml_backend_tensor_set(tensor, &value, 0, sizeof(value));
}

static ggml_status compute(ggml_backend_t backend, ggml_cgraph * graph) {
    ggml_tensor * last = graph->nodes[graph->n_nodes - 1];
    if (FAULT == 2) {
        abort();
    }
    while (FAULT == 3) {
        pause();
    }
    ggml_status status = compute_on_processor(backend, graph);
    if ((FAULT == 4 && last->op == GGML_OP_ROPE) || (FAULT == 5 && graph->n_nodes > 10)) {
        spoil(last);
    }
    return status;
}

static const char * name(ggml_backend_dev_t device) {
    return device == &devices[0] ? "StandIn0" : "StandIn1";
}

static const char * description(ggml_backend_dev_t) {
    return "stand-in GPU";
}

static enum ggml_backend_dev_type type(ggml_backend_dev_t) {
    return GGML_BACKEND_DEVICE_TYPE_GPU;
}

static void properties(ggml_backend_dev_t device, ggml_backend_dev_props * props) {
    memset(props, 0, sizeof(*props));
    props->name = name(device);
    props->description = "stand-in GPU";
    props->type = GGML_BACKEND_DEVICE_TYPE_GPU;
    props->memory_free = props->memory_total = size_t(1) << 30;
}

static ggml_backend_t start(ggml_backend_dev_t device, const char *) {
    if (FAULT == 7 && device == &devices[0]) {
        abort();
    }
    ggml_backend_t backend = ggml_backend_cpu_init();
    compute_on_processor = backend->iface.graph_compute;
    backend->iface.graph_compute = compute;
    backend->device = device;
    return backend;
}

static const size_t given = size_t(FAULT == 8 ? 1 : 17) << 20;
static ggml_backend_buffer_type memory;

static const char * memory_name(ggml_backend_buffer_type_t) {
    return "StandIn0";
}

static size_t taken = 0;
static void (*free_on_processor)(ggml_backend_buffer_t);

static void release(ggml_backend_buffer_t buffer) {
    taken -= buffer->size;
    free_on_processor(buffer);
}

static ggml_backend_buffer_t allocate(ggml_backend_buffer_type_t type, size_t size) {
    if (taken + size > given) {
        return nullptr;
    }
    ggml_backend_buffer_t buffer = ggml_backend_cpu_buffer_type()->iface.alloc_buffer(type, size);
    taken += buffer->size;
    free_on_processor = buffer->iface.free_buffer;
    buffer->iface.free_buffer = release;
    return buffer;
}

static ggml_backend_buffer_type_t memory_type(ggml_backend_dev_t) {
    return &memory;
}

static const char * registry_name(ggml_backend_reg_t) {
    return "StandIn";
}

static size_t count(ggml_backend_reg_t) {
    return number;
}

static ggml_backend_dev_t get(ggml_backend_reg_t, size_t index) {
    return &devices[index];
}

static void * procedure(ggml_backend_reg_t, const char *) {
    return nullptr;
}

static ggml_backend_reg_t stand_in() {
    static ggml_backend_reg registry = {
        GGML_BACKEND_API_VERSION, {registry_name, count, get, procedure}, nullptr
    };
    if (FAULT == 1) {
        abort();
    }
    for (ggml_backend_device & device : devices) {
        device = *ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0);
        device.reg = &registry;
        device.iface.get_name = name;
        device.iface.get_description = description;
        device.iface.get_type = type;
        device.iface.get_props = properties;
        device.iface.init_backend = start;
    }
    if (FAULT == 6 || FAULT == 8) {
        memory = *ggml_backend_cpu_buffer_type();
        memory.iface.get_name = memory_name;
        memory.iface.alloc_buffer = allocate;
        memory.device = &devices[0];
        devices[0].iface.get_buffer_type = memory_type;
    }
    return &registry;
}

GGML_BACKEND_DL_IMPL(stand_in)
