// How many tokens llama-server guesses ahead, asked before each pass through the model; and what each pass took.
//
// The server has no option of a request for that, and decides nothing by time. It calls the functions of
// common/speculative.h, which are exported, through the wheel's own table of functions (JUMP_SLOT). Their entries are
// replaced by functions of this file, which call the original ones. All of them run on the server's own thread.
//
// The server hands its queue to another thread around each of these calls, and waits for it afterwards: two handovers a
// token, of which a small model's token takes less. So what takes no time is called directly.
//
// A draft model of the plain kind reads its tokens only when it is to guess. The server has it read every prompt and
// every token, also those for which it guesses nothing, which costs a pass of the draft for each token.

#pragma once

#include "common.h"
#include "llama.h"
#include "speculative.h"

#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <typeinfo>
#include <vector>

// Most tokens to guess for each answer at the next pass; 0: none; negative: as many as the engine is set to.
//
// active: answers in the last pass. tokens: what they got in it. guessed: tokens that were guessed for it.
// seconds: what it took, with guessing; 0 where it is not known, or was not only of these answers.
// read: tokens that the draft read for it first, because it had missed them. reading: seconds that this took; they are not
// in `seconds`.
// next: answers in the next pass. begun: an answer has begun since the last pass.
// missing: tokens that the draft has not read, which it would have to read first; of all answers together.
typedef int (*Decide)(int active, int tokens, int guessed, double seconds, int read, double reading, int next, int begun,
                      int missing);

namespace guesses {

using Clock = std::chrono::steady_clock;

struct Answer {
    llama_pos at = -1;   // where its next token was to be at the last pass; -1: it was not in it
    int guessed = 0;     // for that pass
    size_t length = 0;   // tokens so far, at the last pass
};

struct State {
    Decide decide = nullptr;
    std::vector<Answer> answers;         // by sequence
    llama_context * draft = nullptr;     // of a draft model that reads only when it is to guess
    bool grams = false;                  // guesses come from the text
    bool begun = false;
    bool known = false;                  // there was a pass before
    int active = 0, guessed = 0;
    int read = 0;                        // tokens that the draft read for that pass, before it guessed
    Clock::duration reading{};           // what it took
    int largest = 0;                     // tokens of the largest batch since the last pass began
    Clock::time_point began;
    bool none = true;                    // nothing was to be guessed at the last pass
    const std::type_info * drafting = nullptr;    // the server's work that only guesses; null: not known yet
    const std::type_info * processing = nullptr;  // and the one that only lets the draft read
    bool called_draft = false, called_process = false;
    Clock::duration inside{};            // time in these calls, of the work that runs
};

inline State state;

inline decltype(&common_speculative_init) init;
inline decltype(&common_speculative_begin) begin;
inline decltype(&common_speculative_process) process;
inline decltype(&common_speculative_draft) draft;
inline decltype(&common_speculative_accept) accept;

inline llama_pos have(llama_seq_id seq) {
    return llama_memory_seq_pos_max(llama_get_memory(state.draft), seq) + 1;
}

// Tokens of an answer that the draft has not read; -1 where they are not all text, so that it cannot.
inline int missing(const common_speculative_draft_params & answer, llama_seq_id seq) {
    if ((llama_pos) answer.prompt->size() != answer.pos0) {
        return -1;
    }
    return std::max(0, answer.pos0 - have(seq));
}

// Let the draft read what it has not read of an answer; false where it cannot.
inline bool catch_up(common_speculative * spec, const common_speculative_draft_params & answer, llama_seq_id seq) {
    const auto began = Clock::now();
    auto * memory = llama_get_memory(state.draft);
    const int unread = missing(answer, seq);
    if (unread < 0) {
        return false;
    }
    if (have(seq) > answer.pos0) {
        llama_memory_seq_rm(memory, seq, answer.pos0, -1);
    }
    const int most = llama_n_batch(state.draft);
    for (llama_pos from = have(seq); from < answer.pos0; from += most) {
        common_batch batch(state.draft);
        for (llama_pos at = from; at < std::min(answer.pos0, from + most); at++) {
            batch.add((*answer.prompt)[at], at, seq, false);
        }
        if (!process(spec, batch)) {
            llama_memory_seq_rm(memory, seq, -1, -1);
            return false;
        }
    }
    // A GPU is still at it. Otherwise the guess would seem to take that time.
    llama_synchronize(state.draft);
    state.read += unread;
    state.reading += Clock::now() - began;
    return true;
}

inline common_speculative * init_and_look(common_params_speculative & params, uint32_t sequences) {
    auto * spec = init(params, sequences);
    state.answers.assign(sequences, Answer());
    state.known = false;
    state.draft = nullptr;
    state.grams = !params.types.empty();
    bool simple = !params.types.empty();
    for (const auto type : params.types) {
        simple = simple && type == COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE;
        state.grams = state.grams && type >= COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE;
    }
    if (spec && simple && params.draft.ctx_dft) {
        const auto * model = llama_get_model(params.draft.ctx_dft);
        // The server saves and restores the state of these around each guess.
        if (!llama_model_is_recurrent(model) && !llama_model_is_hybrid(model)) {
            state.draft = params.draft.ctx_dft;
        }
    }
    return spec;
}

// Lets an answer begin. A map of n-grams takes each prompt for a longer form of the one before in the same slot, and does
// not look at what changed below that one's length: it forgets all first.
inline void begin_anew(common_speculative * spec, llama_seq_id seq, const llama_tokens & prompt) {
    if (state.grams) {
        begin(spec, seq, {});
    }
    begin(spec, seq, prompt);
}

inline void begin_and_note(common_speculative * spec, llama_seq_id seq, const llama_tokens & prompt) {
    state.begun = true;
    if (seq >= 0 && seq < (int) state.answers.size()) {
        state.answers[seq].at = -1;
        state.answers[seq].length = prompt.size();
    }
    begin_anew(spec, seq, prompt);
}

inline bool process_if_needed(common_speculative * spec, const common_batch & batch) {
    state.largest = std::max(state.largest, (int) batch.size());
    state.called_process = true;
    if (state.draft) {
        return true;
    }
    const auto began = Clock::now();
    const bool done = process(spec, batch);
    state.inside += Clock::now() - began;
    return done;
}

inline void draft_as_decided(common_speculative * spec) {
    const auto now = Clock::now();
    const int sequences = state.answers.size();
    int next = 0, tokens = 0, unread = 0;
    // A larger batch had a part of someone's prompt.
    bool alone = state.known && !state.begun && state.largest <= state.active + state.guessed;
    for (int seq = 0; seq < sequences; seq++) {
        const auto & answer = common_speculative_get_draft_params(spec, seq);
        auto & last = state.answers[seq];
        if (!answer.drafting) {
            alone = alone && last.at < 0;
            last.at = -1;
            continue;
        }
        if (state.grams && answer.prompt->size() < last.length) {
            // The context was shifted. A map of n-grams ends the process if it meets a shorter text unprepared.
            begin_anew(spec, seq, *answer.prompt);
        }
        last.length = answer.prompt->size();
        next++;
        alone = alone && last.at >= 0;
        tokens += answer.pos0 - last.at;
        last.at = answer.pos0;
        unread += state.draft ? std::max(0, missing(answer, seq)) : 0;
    }
    const auto in_seconds = [](Clock::duration time) { return std::chrono::duration<double>(time).count(); };
    const double seconds = alone ? in_seconds(now - state.began - state.reading) : 0.0;
    const int width = state.decide(
        state.active, tokens, state.guessed, seconds, state.read, in_seconds(state.reading), next, state.begun, unread);
    state.read = 0;
    state.reading = {};
    for (int seq = 0; seq < sequences; seq++) {
        auto & answer = common_speculative_get_draft_params(spec, seq);
        if (answer.drafting && width > 0) {
            answer.n_max = answer.n_max > 0 ? std::min(answer.n_max, width) : width;
        }
        if (width == 0 || (answer.drafting && state.draft && !catch_up(spec, answer, seq))) {
            answer.drafting = false;
        }
    }
    // Where nothing is to be guessed this resets nothing more, and calls no model.
    draft(spec);
    state.guessed = 0;
    for (int seq = 0; seq < sequences; seq++) {
        const auto & answer = common_speculative_get_draft_params(spec, seq);
        auto & last = state.answers[seq];
        last.guessed = last.at >= 0 && width != 0 ? (int) answer.result->size() : 0;
        state.guessed += last.guessed;
    }
    state.active = next;
    state.none = width == 0;
    state.called_draft = true;
    state.inside += Clock::now() - now;
    state.began = now;
    state.largest = 0;
    state.begun = false;
    state.known = true;
}

inline void accept_and_teach(common_speculative * spec, llama_seq_id seq, uint16_t accepted) {
    // An n-gram remembers how much of its guess was right, and guesses no more the next time. It does not know that the
    // guess was cut off.
    if (state.grams && seq < (int) state.answers.size() && accepted == state.answers[seq].guessed) {
        accepted = std::max<int>(accepted, common_speculative_n_max(spec));
    }
    accept(spec, seq, accepted);
}

using Work = std::function<void()>;
inline void (*yield)(void * queue, Work && work);

// Runs the server's work while another thread serves the queue; without that if the work takes no time. Which work that
// is shows the first time: hardly anything is done in it besides one of the calls above.
inline void yield_if_long(void * queue, Work && work) {
    const std::type_info & kind = work.target_type();
    const bool draft_is_quick = &kind == state.drafting && (state.grams || (state.draft && state.none));
    const bool process_is_quick = &kind == state.processing && (state.grams || state.draft);
    if (draft_is_quick || process_is_quick) {
        work();
        return;
    }
    if (state.drafting && state.processing) {
        yield(queue, std::move(work));
        return;
    }
    state.called_draft = state.called_process = false;
    state.inside = {};
    Clock::duration spent{};
    yield(queue, [&] {
        const auto began = Clock::now();
        work();
        spent = Clock::now() - began;
    });
    if (kind == typeid(void) || spent - state.inside > std::chrono::microseconds(20)) {
        return;
    }
    if (state.called_draft && !state.called_process) {
        state.drafting = &kind;
    } else if (state.called_process && !state.called_draft) {
        state.processing = &kind;
    }
}

// Puts `own` into the table of the library that has `function`; false if that library does not call it by its table.
inline bool replace_in_table(void * function, void * own) {
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
        // The linker may have made the table read only. An entry does not cross a page.
        if (mprotect(reinterpret_cast<void *>(place / page * page), page, PROT_READ | PROT_WRITE) != 0) {
            return false;
        }
        if (own) {
            __atomic_store_n(reinterpret_cast<void **>(place), own, __ATOMIC_RELEASE);
        }
        return true;
    }
    return false;
}

template <class Function>
bool replace(Function & original, Function function, Function own) {
    original = function;
    return replace_in_table(reinterpret_cast<void *>(function), reinterpret_cast<void *>(own));
}

// All functions, or none: each is looked for before the first is replaced.
inline int install(Decide decide) {
    void * const functions[] = {
        reinterpret_cast<void *>(common_speculative_init), reinterpret_cast<void *>(common_speculative_begin),
        reinterpret_cast<void *>(common_speculative_process), reinterpret_cast<void *>(common_speculative_draft),
        reinterpret_cast<void *>(common_speculative_accept),
    };
    for (void * function : functions) {
        if (!replace_in_table(function, nullptr)) {
            return 0;
        }
    }
    state.decide = decide;
    // Not needed, only faster.
    yield = reinterpret_cast<decltype(yield)>(dlsym(RTLD_DEFAULT, "_ZN12server_queue14yield_to_queueEOSt8functionIFvvEE"));
    if (yield) {
        replace_in_table(reinterpret_cast<void *>(yield), reinterpret_cast<void *>(&yield_if_long));
    }
    return replace(init, &common_speculative_init, &init_and_look) &&
           replace(begin, &common_speculative_begin, &begin_and_note) &&
           replace(process, &common_speculative_process, &process_if_needed) &&
           replace(draft, &common_speculative_draft, &draft_as_decided) &&
           replace(accept, &common_speculative_accept, &accept_and_teach);
}

}  // namespace guesses
