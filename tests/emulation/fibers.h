// Blocks, warps and threads of a kernel launch on one CPU thread: every CUDA thread is a fiber that runs until it
// meets a collective. Owns scheduling, collectives and reports; what kernels are spelled with is in shim.h.
//
// Strict where hardware is lenient: a collective needs every thread of the block (barriers) or every lane of the
// mask (warp operations) at the same line of source, and a thread that has left the kernel never counts as
// arrived. What hardware leaves undefined becomes a report and the end of the launch.
#pragma once

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#define HBX_EMUL_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define HBX_EMUL_ASAN 0
#endif
#if defined(__SANITIZE_THREAD__)
#define HBX_EMUL_TSAN 1
extern "C" {  // of libtsan; gcc ships no header with them
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#else
#define HBX_EMUL_TSAN 0
#endif
// What the emulation does itself is ordered by running on one CPU thread, and is nobody's race.
#define HBX_EMUL_OWN __attribute__((no_sanitize("thread")))
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

static dim3 blockIdx, blockDim, gridDim;

// Static shared memory of all kernels of a library: one section, so that it can be refilled as a whole.
#define HBX_EMUL_SECTION __attribute__((section("hbx_shared")))
extern "C" {
extern unsigned char __start_hbx_shared[] __attribute__((visibility("hidden")));
extern unsigned char __stop_hbx_shared[] __attribute__((visibility("hidden")));
}
// The section exists even where no kernel has static shared memory.
static unsigned char hbx_emul_section_start[16] HBX_EMUL_SECTION __attribute__((used));

namespace hbx_emul {

constexpr unsigned MAX_THREADS = 1024;
constexpr size_t STACK = HBX_EMUL_ASAN ? 256 * 1024 : 64 * 1024;
constexpr size_t GUARD = 4096;
constexpr unsigned char PATTERN = 0xA5;

struct Site {
    const char* file;
    int line;
};

enum Op : unsigned {
    RUNNING,  // or ready to
    LEFT,     // has returned from the kernel
    SYNCTHREADS,
    SYNCTHREADS_COUNT,
    SYNCWARP,
    SHFL,
    BALLOT,
    REDUCE_ADD,
    REDUCE_MIN_U,
    REDUCE_MAX_U,
    REDUCE_MIN_I,
    REDUCE_MAX_I,
    REDUCE_AND,
    REDUCE_OR,
    REDUCE_XOR,
    MATCH_ANY,
    ANY,
    ALL,
};

inline const char* name_of(Op op) {
    static const char* const names[] = {
        "running",          "left",           "__syncthreads",  "__syncthreads_count", "__syncwarp",
        "__shfl_sync",      "__ballot_sync",  "__reduce_add_sync", "__reduce_min_sync",   "__reduce_max_sync",
        "__reduce_min_sync", "__reduce_max_sync", "__reduce_and_sync", "__reduce_or_sync", "__reduce_xor_sync",
        "__match_any_sync", "__any_sync",     "__all_sync"};
    return names[op];
}

struct Context {
    void* stack_pointer;
    void* bottom;
    size_t size;
    void* fake_stack;
    void* tsan;          // what ThreadSanitizer calls a thread
    unsigned met[2];     // barriers of the block, and of the warp, that the thread has met
#if !defined(__x86_64__)
    ucontext_t machine;
#endif
};

struct Fiber {
    dim3 thread;
    unsigned number, warp, lane;
    Op op;
    uint32_t mask, source;  // of a warp operation: its mask; of a shuffle: the lane it reads
    Site site;
    uint64_t value, result;
    Context context;
};

struct Warp {
    uint32_t exists, ready, parked;
};

enum Order : unsigned { FORWARD, REVERSE, RANDOM };

struct Launch {
    uint32_t grid[3], block[3];
    uint64_t shared;
    uint64_t seed;
    uint32_t order;
    uint32_t report_bytes;
    char* report;
    uint64_t collectives;  // out: collectives that threads met
};

static Fiber fibers[MAX_THREADS];
static Warp warps[MAX_THREADS / 32];
static uint32_t warps_ready;
static unsigned n_threads, n_left, n_at_barrier;
static Fiber* self;
static Context host;
static Context* previous;
static unsigned char* stacks;
static unsigned n_fibers;  // fibers whose context is set up
static bool failed;
static Launch* launch_now;
static uint64_t random_state;
static unsigned char* dynamic_shared;
static void (*kernel_entry)(void**);
static void** kernel_arguments;

// --- memory order for ThreadSanitizer --------------------------------------------------------------------
// Threads of a block know of one another's writes by barriers only. A place has two sides, used in turn: who runs
// ahead to the next barrier must not pass on what it did to those that still leave this one. Blocks run one after
// another, so a race between two blocks is not seen.

struct Place {
    char sides[2];
};
static Place launch_place, block_place, warp_places[MAX_THREADS / 32];

HBX_EMUL_OWN inline void publish(Place& place, unsigned turn) {
#if HBX_EMUL_TSAN
    __tsan_release(&place.sides[turn & 1]);
#else
    (void)place, (void)turn;
#endif
}

HBX_EMUL_OWN inline void learn(Place& place, unsigned turn) {
#if HBX_EMUL_TSAN
    __tsan_acquire(&place.sides[turn & 1]);
#else
    (void)place, (void)turn;
#endif
}

// Tells TSan that another context runs from here on. Switching orders nothing.
HBX_EMUL_OWN inline void announce(Context* from, Context* to) {
#if HBX_EMUL_TSAN
    constexpr unsigned no_sync = 1;
    if (from == &host) host.tsan = __tsan_get_current_fiber();
    if (!to->tsan) to->tsan = __tsan_create_fiber(0);
    __tsan_switch_to_fiber(to->tsan, no_sync);
#else
    (void)from, (void)to;
#endif
}

// --- switching -----------------------------------------------------------------------------------------

#if defined(__x86_64__)
extern "C" void hbx_emul_switch(void** save, void* load) __attribute__((visibility("hidden")));
asm(".text\n"
    ".p2align 4\n"
    ".globl hbx_emul_switch\n"
    ".hidden hbx_emul_switch\n"
    ".type hbx_emul_switch,@function\n"
    "hbx_emul_switch:\n"
    "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
    "movq %rsp, (%rdi)\n"
    "movq %rsi, %rsp\n"
    "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
    "ret\n"
    ".size hbx_emul_switch, .-hbx_emul_switch\n");
#endif

// Where a context continues: tells ASan, and learns the bounds of the host's stack, which differ per OS thread.
HBX_EMUL_OWN inline void arrived(Context* here) {
#if HBX_EMUL_ASAN
    const void* bottom = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(here->fake_stack, &bottom, &size);
    if (previous == &host) {
        host.bottom = const_cast<void*>(bottom);
        host.size = size;
    }
#else
    (void)here;
#endif
}

HBX_EMUL_OWN __attribute__((noinline)) static void switch_to(Context* from, Context* to) {
    previous = from;
    announce(from, to);
#if HBX_EMUL_ASAN
    __sanitizer_start_switch_fiber(&from->fake_stack, to->bottom, to->size);
#endif
#if defined(__x86_64__)
    hbx_emul_switch(&from->stack_pointer, to->stack_pointer);
#else
    swapcontext(&from->machine, &to->machine);
#endif
    arrived(from);
}

static void fiber_main();

HBX_EMUL_OWN static void prepare(Fiber* fiber) {
    Context* context = &fiber->context;
    context->fake_stack = nullptr;
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(static_cast<unsigned char*>(context->bottom) + context->size);
    memset(top - 8, 0, 8 * sizeof(void*));
    top[-2] = reinterpret_cast<void*>(&fiber_main);  // return address of the first switch
    context->stack_pointer = top - 8;                // six saved registers below it
#else
    getcontext(&context->machine);
    context->machine.uc_stack.ss_sp = context->bottom;
    context->machine.uc_stack.ss_size = context->size;
    context->machine.uc_link = nullptr;
    makecontext(&context->machine, fiber_main, 0);
#endif
}

HBX_EMUL_OWN static void ensure_fibers(unsigned wanted) {
    if (!stacks) {
        void* memory = mmap(nullptr, MAX_THREADS * (STACK + GUARD), PROT_NONE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) {
            perror("emulation: stacks");
            abort();
        }
        stacks = static_cast<unsigned char*>(memory);
    }
    for (; n_fibers < wanted; ++n_fibers) {
        Fiber* fiber = &fibers[n_fibers];
        // A page without access lies below each stack: a stack that overflows stops there.
        unsigned char* bottom = stacks + n_fibers * (STACK + GUARD) + GUARD;
        if (mprotect(bottom, STACK, PROT_READ | PROT_WRITE) != 0) {
            perror("emulation: stacks");
            abort();
        }
        fiber->context.bottom = bottom;
        fiber->context.size = STACK;
        prepare(fiber);
    }
}

// --- reports -------------------------------------------------------------------------------------------

[[noreturn]] HBX_EMUL_OWN static void give_up() {
    failed = true;
    switch_to(&self->context, &host);
    abort();  // the host never comes back to a dropped fiber
}

HBX_EMUL_OWN __attribute__((format(printf, 1, 2))) static void say(const char* format, ...) {
    size_t used = strlen(launch_now->report);
    if (used + 1 >= launch_now->report_bytes) return;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(launch_now->report + used, launch_now->report_bytes - used, format, arguments);
    va_end(arguments);
}

HBX_EMUL_OWN inline bool same_wait(const Fiber& a, const Fiber& b) {
    if (a.op != b.op) return false;
    if (a.op == RUNNING || a.op == LEFT) return true;
    if (a.site.line != b.site.line || strcmp(a.site.file, b.site.file) != 0) return false;
    return a.op == SYNCTHREADS || a.op == SYNCTHREADS_COUNT || a.mask == b.mask;
}

// Names what each thread of the block waits for, runs of threads with equal waits on one line.
HBX_EMUL_OWN static void say_waits() {
    for (unsigned begin = 0; begin < n_threads;) {
        unsigned end = begin + 1;
        while (end < n_threads && same_wait(fibers[begin], fibers[end])) ++end;
        const Fiber& first = fibers[begin];
        if (end - begin == 1)
            say("\n  thread %u ", begin);
        else
            say("\n  threads %u-%u ", begin, end - 1);
        if (first.op == RUNNING) {
            say("can run");
        } else if (first.op == LEFT) {
            say("left the kernel");
        } else {
            say("%s in %s at %s:%d", end - begin == 1 ? "waits" : "wait", name_of(first.op), first.site.file,
                first.site.line);
            if (first.op > SYNCTHREADS_COUNT) say(" with mask 0x%08x", first.mask);
        }
        begin = end;
    }
}

// Ends the launch. What happened comes from the caller, where every thread stands is added here.
[[noreturn]] HBX_EMUL_OWN static void divergent(const char* what) {
    say("%s, in block (%u, %u, %u):", what, blockIdx.x, blockIdx.y, blockIdx.z);
    say_waits();
    give_up();
}

// --- scheduling ----------------------------------------------------------------------------------------

HBX_EMUL_OWN inline uint64_t draw() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

HBX_EMUL_OWN inline unsigned lowest(uint32_t bits) { return static_cast<unsigned>(__builtin_ctz(bits)); }
HBX_EMUL_OWN inline unsigned highest(uint32_t bits) { return 31u - static_cast<unsigned>(__builtin_clz(bits)); }

// A set bit at or above a random place, around the end.
HBX_EMUL_OWN inline unsigned any_of(uint32_t bits, unsigned place) {
    uint32_t above = bits & (0xffffffffu << (place & 31u));
    return lowest(above ? above : bits);
}

HBX_EMUL_OWN inline unsigned choose(uint32_t bits) {
    if (launch_now->order == FORWARD) return lowest(bits);
    if (launch_now->order == REVERSE) return highest(bits);
    return any_of(bits, static_cast<unsigned>(draw() >> 33));
}

// Takes the next thread to run: lowest number first, highest first, or any. Null when none can run.
HBX_EMUL_OWN inline Fiber* take_next() {
    if (!warps_ready) return nullptr;
    unsigned w = choose(warps_ready);
    unsigned lane = choose(warps[w].ready);
    warps[w].ready &= ~(1u << lane);
    if (!warps[w].ready) warps_ready &= ~(1u << w);
    return &fibers[w * 32 + lane];
}

HBX_EMUL_OWN inline void make_ready(unsigned w, uint32_t lanes) {
    warps[w].ready |= lanes;
    warps_ready |= 1u << w;
    for (uint32_t rest = lanes; rest; rest &= rest - 1) fibers[w * 32 + lowest(rest)].op = RUNNING;
}

// The running thread cannot go on: another one does.
HBX_EMUL_OWN static void yield_self() {
    Fiber* me = self;
    Fiber* next = take_next();
    if (!next) divergent("divergent threads: none can go on");
    if (next == me) return;
    self = next;
    switch_to(&me->context, &next->context);
}

HBX_EMUL_OWN static void fiber_main() {
    arrived(&self->context);
    for (;;) {
        learn(launch_place, 0);
        self->context.met[0] = self->context.met[1] = 0;
        kernel_entry(kernel_arguments);
        publish(launch_place, 0);
        Fiber* me = self;
        me->op = LEFT;
        ++n_left;
        Fiber* next = take_next();
        if (next) {
            self = next;
            switch_to(&me->context, &next->context);
        } else if (n_left == n_threads) {
            switch_to(&me->context, &host);
        } else {
            divergent("divergent threads: some left the kernel, others wait");
        }
    }
}

// --- collectives ---------------------------------------------------------------------------------------

HBX_EMUL_OWN __attribute__((noinline)) static uint64_t barrier(Op op, uint64_t value, Site site) {
    Fiber* me = self;
    ++launch_now->collectives;
    me->op = op;
    me->site = site;
    me->value = value;
    unsigned turn = me->context.met[0]++;
    publish(block_place, turn);
    if (++n_at_barrier == n_threads) {
        uint64_t sum = 0;
        for (unsigned t = 0; t < n_threads; ++t) {
            if (!same_wait(fibers[0], fibers[t])) divergent("divergent barrier: threads meet at different places");
            sum += fibers[t].value;
        }
        for (unsigned t = 0; t < n_threads; ++t) fibers[t].result = sum;
        n_at_barrier = 0;
        for (unsigned w = 0; w * 32 < n_threads; ++w) make_ready(w, warps[w].exists);
    }
    yield_self();
    learn(block_place, turn);
    return me->result;
}

HBX_EMUL_OWN static uint64_t reduce(Op op, const Fiber* base, uint32_t lanes) {
    uint32_t sum = static_cast<uint32_t>(base[lowest(lanes)].value);
    for (uint32_t rest = lanes & (lanes - 1); rest; rest &= rest - 1) {
        uint32_t x = static_cast<uint32_t>(base[lowest(rest)].value);
        switch (op) {
            case REDUCE_ADD: sum += x; break;
            case REDUCE_MIN_U: sum = x < sum ? x : sum; break;
            case REDUCE_MAX_U: sum = x > sum ? x : sum; break;
            case REDUCE_MIN_I: sum = static_cast<int32_t>(x) < static_cast<int32_t>(sum) ? x : sum; break;
            case REDUCE_MAX_I: sum = static_cast<int32_t>(x) > static_cast<int32_t>(sum) ? x : sum; break;
            case REDUCE_AND: sum &= x; break;
            case REDUCE_OR: sum |= x; break;
            default: sum ^= x; break;
        }
    }
    return sum;
}

HBX_EMUL_OWN static uint32_t ballot(const Fiber* base, uint32_t lanes) {
    uint32_t bits = 0;
    for (uint32_t rest = lanes; rest; rest &= rest - 1) {
        unsigned lane = lowest(rest);
        if (base[lane].value) bits |= 1u << lane;
    }
    return bits;
}

// Results of a warp operation that all lanes have met.
HBX_EMUL_OWN static void finish(Op op, Fiber* base, uint32_t lanes) {
    uint64_t common = 0;
    if (op == BALLOT || op == ANY || op == ALL) {
        uint32_t bits = ballot(base, lanes);
        common = op == BALLOT ? bits : op == ANY ? bits != 0 : bits == lanes;
    } else if (op >= REDUCE_ADD && op <= REDUCE_XOR) {
        common = reduce(op, base, lanes);
    }
    for (uint32_t rest = lanes; rest; rest &= rest - 1) {
        Fiber& lane = base[lowest(rest)];
        lane.result = common;
        if (op == SHFL) {
            // What a lane outside the operation holds is undefined: a value that shows.
            bool inside = lanes >> lane.source & 1u;
            lane.result = inside ? base[lane.source].value : 0xDEADBEEFDEADBEEFull;
        } else if (op == MATCH_ANY) {
            for (uint32_t others = lanes; others; others &= others - 1) {
                unsigned other = lowest(others);
                if (base[other].value == lane.value) lane.result |= 1u << other;
            }
        }
    }
}

HBX_EMUL_OWN __attribute__((noinline)) static uint64_t collective(Op op, uint32_t mask, uint64_t value, uint32_t source,
                                                     Site site) {
    Fiber* me = self;
    Warp& warp = warps[me->warp];
    ++launch_now->collectives;
    me->op = op;
    me->mask = mask;
    me->value = value;
    me->source = source;
    me->site = site;
    if (!(mask >> me->lane & 1u)) {
        divergent("a mask leaves out the lane that passes it");
    }
    // Of the warp operations __syncwarp alone orders memory (CUDA programming guide, memory fence functions).
    unsigned turn = op == SYNCWARP ? me->context.met[1]++ : 0;
    if (op == SYNCWARP) publish(warp_places[me->warp], turn);
    warp.parked |= 1u << me->lane;
    uint32_t lanes = mask & warp.exists;
    if ((lanes & ~warp.parked) == 0) {
        Fiber* base = &fibers[me->warp * 32];
        for (uint32_t rest = lanes; rest; rest &= rest - 1) {
            if (!same_wait(*me, base[lowest(rest)])) divergent("divergent warp: lanes meet at different places");
        }
        finish(op, base, lanes);
        warp.parked &= ~lanes;
        make_ready(me->warp, lanes);
    }
    yield_self();
    if (op == SYNCWARP) learn(warp_places[me->warp], turn);
    return me->result;
}

// --- launches ------------------------------------------------------------------------------------------

// Shared memory starts with a pattern in every block: what is read before it is written shows. Red zones
// between arrays are written too, so this must not be instrumented (nor become a call of memset, which is).
__attribute__((no_sanitize("address"), no_sanitize("undefined"), no_sanitize("thread"), noinline)) static void fill(unsigned char* begin,
                                                                                           unsigned char* end) {
    unsigned char* p = begin;
    for (; p < end && reinterpret_cast<uintptr_t>(p) % 8; ++p) *static_cast<volatile unsigned char*>(p) = PATTERN;
    for (; p + 8 <= end; p += 8) *reinterpret_cast<volatile uint64_t*>(p) = 0x0101010101010101ull * PATTERN;
    for (; p < end; ++p) *static_cast<volatile unsigned char*>(p) = PATTERN;
}

HBX_EMUL_OWN static void run_block() {
    fill(__start_hbx_shared, __stop_hbx_shared);
    memset(dynamic_shared, PATTERN, launch_now->shared);
    n_left = n_at_barrier = 0;
    warps_ready = 0;
    for (unsigned w = 0; w * 32 < n_threads; ++w) {
        unsigned lanes = n_threads - w * 32;
        uint32_t exists = lanes >= 32 ? 0xffffffffu : (1u << lanes) - 1u;
        warps[w] = {exists, 0, 0};
        make_ready(w, exists);
    }
    self = take_next();
    publish(launch_place, 0);
    switch_to(&host, &self->context);
    learn(launch_place, 0);
}

HBX_EMUL_OWN static void set_block(uint64_t number) {
    blockIdx = dim3(static_cast<unsigned>(number % gridDim.x), static_cast<unsigned>(number / gridDim.x % gridDim.y),
                    static_cast<unsigned>(number / gridDim.x / gridDim.y));
}

// Blocks run one after another: ascending, descending, or from a random one on around the end.
HBX_EMUL_OWN static void run_blocks() {
    uint64_t n = static_cast<uint64_t>(gridDim.x) * gridDim.y * gridDim.z;
    uint64_t start = launch_now->order == RANDOM ? draw() % n : 0;
    for (uint64_t k = 0; k < n && !failed; ++k) {
        set_block(launch_now->order == REVERSE ? n - 1 - k : (start + k) % n);
        run_block();
    }
}

// Runs a kernel; 0, or 1 with the launch's report filled in. One launch at a time.
HBX_EMUL_OWN static int run(Launch* launch, void (*entry)(void**), void** arguments) {
    launch_now = launch;
    launch->report[0] = 0;
    launch->collectives = 0;
    kernel_entry = entry;
    kernel_arguments = arguments;
    gridDim = dim3(launch->grid[0], launch->grid[1], launch->grid[2]);
    blockDim = dim3(launch->block[0], launch->block[1], launch->block[2]);
    n_threads = blockDim.x * blockDim.y * blockDim.z;
    random_state = (launch->seed + 1) * 0x9E3779B97F4A7C15ull;
    ensure_fibers(n_threads);
    for (unsigned t = 0; t < n_threads; ++t) {
        Fiber& fiber = fibers[t];
        fiber.number = t;
        fiber.warp = t / 32;
        fiber.lane = t % 32;
        fiber.thread = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y);
    }
    // Exactly the bytes asked for, so that ASan guards the end; none at all gives the end of a block.
    unsigned char* memory = static_cast<unsigned char*>(malloc(launch->shared ? launch->shared : 16));
    dynamic_shared = launch->shared ? memory : memory + 16;
    failed = false;
    run_blocks();
    free(memory);
    if (!failed) return 0;
    // Fibers that were dropped halfway start anew.
    for (unsigned t = 0; t < n_fibers; ++t) {
#if HBX_EMUL_ASAN
        __asan_unpoison_memory_region(fibers[t].context.bottom, STACK);
#endif
        prepare(&fibers[t]);
    }
    return 1;
}

}  // namespace hbx_emul
