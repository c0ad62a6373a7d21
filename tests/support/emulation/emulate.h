// CUDA on one CPU thread, to test what kernels compute: a fiber per CUDA thread, a whole cluster of blocks resident.
//
// A fiber runs until it waits at a barrier (or a shuffle, which is one) or, in random schedules, now and then at a
// memory access. Schedule 0 takes turns. Odd seeds run a random block as far as it can get before any other, even
// seeds a random warp, so that what lacks a barrier goes wrong. Shared memory starts as NaN when the first thread of
// its block runs and is NaN again once the last has returned. Deadlocks, writes past the end of shared memory and warp
// operations of warps with returned lanes are errors.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace emulation {

constexpr size_t STACK_BYTES = 128 * 1024;
constexpr size_t GUARD_BYTES = 256;
constexpr unsigned char POISON = 0xFF;
constexpr unsigned char GUARD = 0xA5;
constexpr int WARP = 32;
constexpr int PREEMPTION_PERIOD = 16;

struct Barrier {
    int arrived = 0, live = 0;
    unsigned generation = 0;
};

struct Warp {
    Barrier barrier;
    int lanes = 0;
    uint64_t exchanged[2][WARP];  // alternating, so that a fast lane's next value does not overwrite a slow lane's last
};

struct Block {
    std::vector<Warp> warps;
    std::unique_ptr<unsigned char[]> memory;
    unsigned char* shared = nullptr;
    Barrier barrier;
    dim3 index{};
    unsigned rank = 0;
    bool started = false;
};

struct Fiber {
    ucontext_t start;
    jmp_buf here;
    std::unique_ptr<char[]> stack;
    Block* block = nullptr;
    int thread = 0;
    unsigned exchanges = 0, cluster_generation = 0;
    bool begun = false, done = true;
};

struct State {
    jmp_buf scheduler;
    ucontext_t scheduler_context;
    Fiber* current = nullptr;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Block> blocks;  // of the cluster
    Barrier cluster_barrier;
    dim3 grid{}, block{};
    size_t shared_bytes = 0;
    void (*run)(int, const void*) = nullptr;
    int kernel = 0;
    const void* arguments = nullptr;
    uint64_t schedule = 0, random = 0, progress = 0;
    std::string error;
};
inline State state;

inline unsigned next_random(unsigned below) {
    state.random = state.random * 6364136223846793005ull + 1442695040888963407ull;
    return unsigned(state.random >> 33) % below;
}

inline Block& block() { return *state.current->block; }
inline Warp& warp() { return block().warps[state.current->thread / WARP]; }

__attribute__((noinline)) inline void to_scheduler() {
    if (_setjmp(state.current->here) == 0) _longjmp(state.scheduler, 1);
}

inline void fail(const char* reason) {
    if (state.error.empty()) {
        char where[96];
        snprintf(where, sizeof where, " (block %u,%u thread %d)", block().index.x, block().index.y,
                 state.current->thread);
        state.error = std::string(reason) + where;
    }
    to_scheduler();  // never resumed
}

inline void preempt() {
    if (state.schedule != 0 && next_random(PREEMPTION_PERIOD) == 0) {
        ++state.progress;
        to_scheduler();
    }
}

inline void release_if_complete(Barrier& barrier) {
    if (barrier.arrived >= barrier.live && barrier.arrived > 0) {
        barrier.arrived = 0;
        ++barrier.generation;
        ++state.progress;
    }
}

inline unsigned arrive(Barrier& barrier) {
    const unsigned generation = barrier.generation;
    ++barrier.arrived;
    release_if_complete(barrier);
    return generation;
}

inline void wait(Barrier& barrier, unsigned generation) {
    while (barrier.generation == generation) to_scheduler();
}

inline void synchronise(Barrier& barrier) { wait(barrier, arrive(barrier)); }

inline void synchronise_warp() {
    if (warp().barrier.live < warp().lanes) fail("a warp operation after lanes of the warp returned");
    synchronise(warp().barrier);
}

inline void leave() {
    for (Barrier* barrier : {&warp().barrier, &block().barrier, &state.cluster_barrier}) {
        --barrier->live;
        release_if_complete(*barrier);
    }
    ++state.progress;
    state.current->done = true;
    Block& mine = block();
    if (mine.barrier.live > 0) return;
    for (size_t i = 0; i < GUARD_BYTES; ++i) {
        if (mine.shared[state.shared_bytes + i] != GUARD) fail("a write past the end of shared memory");
    }
    memset(mine.shared, POISON, state.shared_bytes);
}

inline void fiber_main() {
    for (;;) {
        Block& mine = block();
        if (!mine.started) memset(mine.shared, POISON, state.shared_bytes);
        mine.started = true;
        state.run(state.kernel, state.arguments);
        leave();
        to_scheduler();
    }
}

__attribute__((noinline)) inline void resume(Fiber& fiber) {
    state.current = &fiber;
    if (_setjmp(state.scheduler) != 0) return;
    if (fiber.begun) _longjmp(fiber.here, 1);
    fiber.begun = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = STACK_BYTES;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
    swapcontext(&state.scheduler_context, &fiber.start);
}

inline void place_blocks(unsigned first_x, unsigned y, unsigned cluster) {
    const int threads = int(state.block.x);
    state.blocks.resize(cluster);
    state.cluster_barrier = Barrier();
    state.cluster_barrier.live = int(cluster) * threads;
    for (unsigned rank = 0; rank < cluster; ++rank) {
        Block& placed = state.blocks[rank];
        placed = Block();
        placed.index = {first_x + rank, y, 0};
        placed.rank = rank;
        placed.barrier.live = threads;
        placed.warps.resize((threads + WARP - 1) / WARP);
        for (size_t w = 0; w < placed.warps.size(); ++w) {
            placed.warps[w].lanes = placed.warps[w].barrier.live = std::min(WARP, threads - int(w) * WARP);
        }
        placed.memory.reset(new unsigned char[state.shared_bytes + GUARD_BYTES + 128]);
        placed.shared = (unsigned char*)((uintptr_t(placed.memory.get()) + 127) & ~uintptr_t(127));
        memset(placed.shared, POISON, state.shared_bytes);
        memset(placed.shared + state.shared_bytes, GUARD, GUARD_BYTES);
    }
    while (state.fibers.size() < size_t(threads) * cluster) {
        state.fibers.push_back(std::make_unique<Fiber>());
        state.fibers.back()->stack.reset(new char[STACK_BYTES]);
    }
    for (int i = 0; i < threads * int(cluster); ++i) {
        Fiber& fiber = *state.fibers[i];
        fiber.block = &state.blocks[i / threads];
        fiber.thread = i % threads;
        fiber.exchanges = fiber.cluster_generation = 0;
        fiber.done = false;
    }
}

inline void shuffle(std::vector<int>& values) {
    for (size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[next_random(unsigned(i))]);
}

// Fibers that the scheduler runs together until none of them can go on.
inline std::vector<std::vector<int>> units(unsigned cluster) {
    const int threads = int(state.block.x), all = threads * int(cluster);
    const int size = state.schedule == 0 ? all : state.schedule % 2 ? threads : std::min(threads, WARP);
    std::vector<std::vector<int>> result;
    for (int first = 0; first < all; first += size) {
        result.emplace_back(std::min(size, all - first));
        std::iota(result.back().begin(), result.back().end(), first);
    }
    return result;
}

inline void run_cluster(unsigned cluster) {
    auto groups = units(cluster);
    std::vector<int> turns(groups.size());
    std::iota(turns.begin(), turns.end(), 0);
    int left = int(state.block.x * cluster);
    while (left > 0) {
        const uint64_t before = state.progress;
        if (state.schedule != 0) shuffle(turns);
        for (int turn : turns) {
            uint64_t last;
            do {
                last = state.progress;
                if (state.schedule != 0) shuffle(groups[turn]);
                for (int i : groups[turn]) {
                    Fiber& fiber = *state.fibers[i];
                    if (fiber.done) continue;
                    resume(fiber);
                    if (!state.error.empty()) return;
                    left -= fiber.done;
                }
            } while (state.progress != last);
        }
        if (state.progress == before && left > 0) {
            state.error = "deadlock: " + std::to_string(left) + " threads wait at barriers that the others never reach";
            return;
        }
    }
}

inline const char* launch(void (*run)(int, const void*), int kernel, const void* arguments, unsigned grid_x,
                          unsigned grid_y, unsigned threads, size_t shared_bytes, unsigned cluster, uint64_t schedule) {
    state.run = run;
    state.kernel = kernel;
    state.arguments = arguments;
    state.grid = {grid_x, grid_y, 1};
    state.block = {threads, 1, 1};
    state.shared_bytes = shared_bytes;
    state.schedule = schedule;
    state.random = schedule * 0x9E3779B97F4A7C15ull + 1;
    state.error.clear();
    for (unsigned y = 0; y < grid_y && state.error.empty(); ++y) {
        for (unsigned x = 0; x < grid_x && state.error.empty(); x += cluster) {
            place_blocks(x, y, cluster);
            run_cluster(cluster);
        }
    }
    if (state.error.empty()) return nullptr;
    state.fibers.clear();  // some hang in the middle of a kernel
    return state.error.c_str();
}

template <class Arguments>
inline void call(void (*kernel)(Arguments), const void* arguments) {
    kernel(*static_cast<const Arguments*>(arguments));
}
template <class Arguments>
constexpr size_t argument_bytes(void (*)(Arguments)) {
    return sizeof(Arguments);
}

template <class T>
inline uint64_t to_bits(T value) {
    static_assert(sizeof value <= 8, "at most 64 bits");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    return bits;
}
template <class T>
inline T from_bits(uint64_t bits) {
    T value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline int lane() { return state.current->thread % WARP; }

// All lanes' values of this exchange.
inline const uint64_t* exchange(uint64_t value) {
    Warp& mine = warp();
    uint64_t* values = mine.exchanged[state.current->exchanges++ % 2];
    values[lane()] = value;
    synchronise_warp();
    return values;
}
template <class T>
inline T from_lane(T value, int source) {
    const uint64_t* values = exchange(to_bits(value));
    return from_bits<T>(values[source < 0 || source >= warp().lanes ? lane() : source]);
}

struct Index {
    struct {
        operator unsigned() const { return state.current->thread; }
    } x;
};
struct BlockIndex {
    struct {
        operator unsigned() const { return block().index.x; }
    } x;
    struct {
        operator unsigned() const { return block().index.y; }
    } y;
};

}  // namespace emulation

static emulation::Index threadIdx;
static emulation::BlockIndex blockIdx;
#define blockDim (emulation::state.block)
#define gridDim (emulation::state.grid)

inline void __syncthreads() { emulation::synchronise(emulation::block().barrier); }
inline void __syncwarp(unsigned = ~0u) { emulation::synchronise_warp(); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
inline T __shfl_sync(unsigned, T value, int source) {
    return emulation::from_lane(value, source % emulation::WARP);
}
template <class T>
inline T __shfl_xor_sync(unsigned, T value, int bits) {
    return emulation::from_lane(value, emulation::lane() ^ bits);
}
template <class T>
inline T __shfl_up_sync(unsigned, T value, unsigned distance) {
    return emulation::from_lane(value, emulation::lane() - int(distance));
}
template <class T>
inline T __shfl_down_sync(unsigned, T value, unsigned distance) {
    return emulation::from_lane(value, emulation::lane() + int(distance));
}
inline unsigned __ballot_sync(unsigned, int predicate) {
    const uint64_t* values = emulation::exchange(predicate != 0);
    unsigned ballot = 0;
    for (int i = 0; i < emulation::warp().lanes; ++i) ballot |= unsigned(values[i]) << i;
    return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(unsigned(bits)) : 32; }
inline int __clzll(long long bits) { return bits ? __builtin_clzll((unsigned long long)bits) : 64; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t((uint64_t(a) * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)(((unsigned __int128)a * b) >> 64);
}
inline float __fmul_rn(float a, float b) { return a * b; }  // compiled with -ffp-contract=off
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __uint_as_float(uint32_t bits) { return emulation::from_bits<float>(bits); }
inline uint32_t __float_as_uint(float value) { return uint32_t(emulation::to_bits(value)); }
inline int __float2int_rd(float value) { return int(std::floor(value)); }
inline int __float2int_rn(float value) { return int(std::nearbyint(value)); }
inline unsigned long long __float2ull_rz(float value) { return (unsigned long long)value; }

// One fiber runs at a time: plain operations are atomic.
template <class T, class U>
inline T atomicAdd(T* address, U value) {
    emulation::preempt();
    const T old = *address;
    *address = T(old + value);
    return old;
}
template <class T, class U>
inline T atomicOr(T* address, U value) {
    emulation::preempt();
    const T old = *address;
    *address = T(old | value);
    return old;
}
template <class T, class U>
inline T atomicMax(T* address, U value) {
    emulation::preempt();
    const T old = *address;
    *address = std::max(old, T(value));
    return old;
}

// What device.cuh has in PTX.
inline float exp2_approx(float x) {
    const float result = std::exp2(x);
    return std::fpclassify(result) == FP_SUBNORMAL ? 0.0f : result;
}
template <class T>
inline void require_aligned(const T* address) {
    if (uintptr_t(address) % sizeof(T)) emulation::fail("a misaligned access");
}
template <class T>
inline T load_streaming(const T* address) {
    require_aligned(address);
    emulation::preempt();
    return *address;
}
template <class T>
inline void store_streaming(T* address, T value) {
    require_aligned(address);
    emulation::preempt();
    *address = value;
}
inline unsigned cluster_rank() { return emulation::block().rank; }
inline unsigned cluster_size() { return unsigned(emulation::state.blocks.size()); }
inline void cluster_arrive() {
    emulation::state.current->cluster_generation = emulation::arrive(emulation::state.cluster_barrier);
}
inline void cluster_wait() {
    emulation::wait(emulation::state.cluster_barrier, emulation::state.current->cluster_generation);
}
// The same variable in the shared memory of another block of the cluster.
template <class T>
inline T* map_shared(T* variable, unsigned rank) {
    const size_t offset = (unsigned char*)variable - emulation::block().shared;
    return (T*)(emulation::state.blocks[rank].shared + offset);
}
#define SHARED_MEMORY(name) unsigned char* const name = emulation::block().shared

inline uint16_t bf16_bits(float value) {
    const uint32_t bits = __float_as_uint(value);
    if (std::isnan(value)) return 0x7FFF;
    return uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
inline uint16_t fp16_bits(float value) {
    const uint32_t bits = __float_as_uint(value), magnitude = bits & 0x7FFFFFFFu;
    const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
    if (magnitude > 0x7F800000u) return 0x7FFF;
    if (magnitude >= 0x477FF000u) return uint16_t(sign | 0x7C00u);
    if (magnitude < 0x38800000u) {  // subnormal in fp16: the addition rounds at 2^-24
        return uint16_t(sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3F000000u));
    }
    return uint16_t(sign | ((magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13));
}
inline float fp16_value(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000u) << 16, magnitude = half & 0x7FFFu;
    if (magnitude >= 0x7C00u) return __uint_as_float(sign | 0x7F800000u | ((magnitude & 0x3FFu) << 13));
    const float value = std::ldexp(__uint_as_float(0x3F800000u | ((magnitude & 0x3FFu) << 13)), int(magnitude >> 10) - 15);
    const float result = magnitude < 0x400u ? std::ldexp(float(magnitude), -24) : value;
    return sign ? -result : result;
}
inline uint32_t bf16_pair(float low, float high) { return bf16_bits(low) | uint32_t(bf16_bits(high)) << 16; }
inline uint32_t fp16_pair(float low, float high) { return fp16_bits(low) | uint32_t(fp16_bits(high)) << 16; }
inline uint32_t bf16_larger(uint32_t a, uint32_t b) {
    const auto low = [](uint32_t word) { return __uint_as_float(word << 16); };
    return bf16_pair(std::fmax(low(a), low(b)), std::fmax(low(a >> 16), low(b >> 16)));
}
inline uint32_t fp16_larger(uint32_t a, uint32_t b) {
    const auto low = [](uint32_t word) { return fp16_value(uint16_t(word)); };
    return fp16_pair(std::fmax(low(a), low(b)), std::fmax(low(a >> 16), low(b >> 16)));
}

