// Saves and restores the slots of the llama-server that runs in this process, through the server's own task queue.
//
// Compiled against the headers of the very release that the wheel was built from; see slots.py. The server does what its
// tasks SLOT_SAVE and SLOT_RESTORE do, on its own thread, and only while the slot is idle. Nothing is opened over HTTP.
//
// It also decides how many tokens are guessed ahead: see guesses.h.

#include "common.h"
#include "guesses.h"
#include "server-context.h"

#include <chrono>
#include <cstring>
#include <memory>
#include <string>

namespace {

constexpr int DONE = 0, REFUSED = 1, LATE = -1, NO_ROOM = -2, FAILED = -3;

// The beginning of xllamacpp::Server (src/xllamacpp/server.h), whose fields are private.
struct Server {
    common_params params;
    std::string address;
    std::shared_ptr<server_context> context;
};

int ask(server_context * context, server_task && task, double seconds, char * out, size_t room) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    auto reader = context->get_response_reader();
    task.id = reader.get_new_id();
    reader.post_task(std::move(task));
    // What is late is cancelled by the reader's destructor.
    const auto result = reader.next([until] { return std::chrono::steady_clock::now() >= until; });
    if (!result) {
        return LATE;
    }
    const std::string text = result->to_json().dump();
    if (text.size() >= room) {
        return NO_ROOM;
    }
    std::memcpy(out, text.c_str(), text.size() + 1);
    return result->is_error() ? REFUSED : DONE;
}

}  // namespace

extern "C" {

// Before a server is made: asks `decide` from now on, before each pass. 0 where this build cannot be asked.
int mesh_llm_guesses_install(Decide decide) {
    return guesses::install(decide);
}

// The server's context; null if the object is not the server that listens at this address.
void * mesh_llm_slots_open(void * server, const char * address) {
    auto * known = static_cast<Server *>(server);
    return known->address == address ? known->context.get() : nullptr;
}

int mesh_llm_slots_list(void * context, double seconds, char * out, size_t room) {
    try {
        return ask(static_cast<server_context *>(context), server_task(SERVER_TASK_TYPE_SLOT_GET), seconds, out, room);
    } catch (...) {
        return FAILED;
    }
}

int mesh_llm_slots_move(void * context, int save, int slot, const char * path, double seconds, char * out, size_t room) {
    try {
        server_task task(save ? SERVER_TASK_TYPE_SLOT_SAVE : SERVER_TASK_TYPE_SLOT_RESTORE);
        task.slot_action.id_slot = slot;
        task.slot_action.filename = "slot";
        task.slot_action.filepath = path;
        return ask(static_cast<server_context *>(context), std::move(task), seconds, out, room);
    } catch (...) {
        return FAILED;
    }
}

}
