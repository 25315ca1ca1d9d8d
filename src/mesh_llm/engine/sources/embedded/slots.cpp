// Saves and restores the slots of the llama-server that runs in this process, through the server's own task queue.
//
// Compiled against the headers of the very release that the wheel was built from; see slots.py. The server does what its
// tasks SLOT_SAVE and SLOT_RESTORE do, on its own thread, and only while the slot is idle. Nothing is opened over HTTP.
//
// It also switches speculation on and off. The server has no option of a request for that. It calls
// common_speculative_draft, which is exported, through the wheel's own table of functions (JUMP_SLOT): the entry is
// replaced by a function that guesses nothing while speculation is off.

#include "common.h"
#include "server-context.h"
#include "speculative.h"

#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
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

std::atomic<bool> speculating{true};
void (*draft)(common_speculative *) = nullptr;

void draft_if_on(common_speculative * spec) {
    if (speculating.load(std::memory_order_relaxed)) {
        draft(spec);
    }
}

// Puts `own` into the table of the library that has `function`; false if that library does not call it by its table.
bool replace_in_table(void * function, void * own) {
    Dl_info info{};
    link_map * map = nullptr;
    if (!dladdr1(function, &info, reinterpret_cast<void **>(&map), RTLD_DL_LINKMAP) || !map || !info.dli_sname) {
        return false;
    }
    const ElfW(Rela) * entries = nullptr;
    const ElfW(Sym) * symbols = nullptr;
    const char * names = nullptr;
    size_t bytes = 0;
    const auto at = [&](ElfW(Addr) place) { return place < map->l_addr ? place + map->l_addr : place; };
    for (const ElfW(Dyn) * part = map->l_ld; part->d_tag != DT_NULL; part++) {
        switch (part->d_tag) {
            case DT_JMPREL: entries = reinterpret_cast<const ElfW(Rela) *>(at(part->d_un.d_ptr)); break;
            case DT_PLTRELSZ: bytes = part->d_un.d_val; break;
            case DT_SYMTAB: symbols = reinterpret_cast<const ElfW(Sym) *>(at(part->d_un.d_ptr)); break;
            case DT_STRTAB: names = reinterpret_cast<const char *>(at(part->d_un.d_ptr)); break;
            default: break;
        }
    }
    if (!entries || !symbols || !names) {
        return false;
    }
    const size_t page = sysconf(_SC_PAGESIZE);
    for (size_t i = 0; i < bytes / sizeof(ElfW(Rela)); i++) {
        if (std::strcmp(names + symbols[ELF64_R_SYM(entries[i].r_info)].st_name, info.dli_sname) != 0) {
            continue;
        }
        const auto place = map->l_addr + entries[i].r_offset;
        // The linker may have made the table read only.
        if (mprotect(reinterpret_cast<void *>(place / page * page), page, PROT_READ | PROT_WRITE) != 0) {
            return false;
        }
        __atomic_store_n(reinterpret_cast<void **>(place), own, __ATOMIC_RELEASE);
        return true;
    }
    return false;
}

}  // namespace

extern "C" {

// Guesses from now on, or not; 0 where this build of the server cannot be switched.
int mesh_llm_slots_speculate(int on) {
    if (!draft) {
        draft = common_speculative_draft;
        if (!replace_in_table(reinterpret_cast<void *>(draft), reinterpret_cast<void *>(draft_if_on))) {
            draft = nullptr;
            return 0;
        }
    }
    speculating = on != 0;
    return 1;
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
