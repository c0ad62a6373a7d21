// What every kernel needs of the device, without a CUDA header: users compile with NVRTC and may have none.
//
// The tests compile the same kernels for the CPU; then emulate.h supplies what is written in PTX here.
#pragma once
#ifdef EMULATED
#include "emulate.h"
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

#ifndef EMULATED

#define SHARED_MEMORY(name) extern __shared__ __align__(128) u8 name[]

__device__ __forceinline__ float exp2_approx(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// Data that is read or written once: first to leave the caches.
template <class T>
__device__ __forceinline__ T load_streaming(const T* address) {
    return __ldcs(address);
}
template <class T>
__device__ __forceinline__ void store_streaming(T* address, T value) {
    __stcs(address, value);
}

// Without clusters (before sm_90) a block is one by itself.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ u32 cluster_size() {
    u32 size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same variable in the shared memory of another block of the cluster.
template <class T>
__device__ __forceinline__ T* map_shared(T* variable, u32 rank) {
    u64 mapped;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"((u64)variable), "r"(rank));
    return (T*)mapped;
}
#else
__device__ __forceinline__ u32 cluster_rank() { return 0; }
__device__ __forceinline__ u32 cluster_size() { return 1; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() { __syncthreads(); }
template <class T>
__device__ __forceinline__ T* map_shared(T* variable, u32) {
    return variable;
}
#endif

// Two values rounded to nearest even; the first in the low half.
__device__ __forceinline__ u32 bf16_pair(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
__device__ __forceinline__ u32 fp16_pair(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
// The larger of each half; of a number and NaN the number, as fmaxf has it.
__device__ __forceinline__ u32 bf16_larger(u32 a, u32 b) {
    u32 pair;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
}
__device__ __forceinline__ u32 fp16_larger(u32 a, u32 b) {
    u32 pair;
    asm("max.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
}
__device__ __forceinline__ float fp16_value(u16 half) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
}

#endif  // EMULATED

constexpr int WARP_SIZE = 32;
constexpr u32 ALL_LANES = 0xFFFFFFFFu;
constexpr float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7F800000u); }
__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7FFFFFFFu); }
__device__ __forceinline__ float exp_approx(float x) { return exp2_approx(x * LOG2_E); }

__device__ __forceinline__ void cluster_synchronise() {
    cluster_arrive();
    cluster_wait();
}

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int distance = WARP_SIZE / 2; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(ALL_LANES, value, distance);
    }
    return value;
}

// Storage types. Sixteen bytes of them are what one instruction loads.
struct bf16 {
    u16 bits;
};
struct fp16 {
    u16 bits;
};
typedef float fp32;

template <class T>
struct Format;  // of 16 or 32 bits; `larger` compares words value by value, `largest` is that of a word

template <>
struct Format<bf16> {
    static constexpr u32 MINUS_INFINITY = 0xFF80FF80u;  // in every value of a word
    static __device__ __forceinline__ float low(u32 word) { return __uint_as_float(word << 16); }
    static __device__ __forceinline__ float high(u32 word) { return __uint_as_float(word & 0xFFFF0000u); }
    static __device__ __forceinline__ u32 pair(float low, float high) { return bf16_pair(low, high); }
    static __device__ __forceinline__ u32 larger(u32 a, u32 b) { return bf16_larger(a, b); }
    static __device__ __forceinline__ float largest(u32 word) { return fmaxf(low(word), high(word)); }
    static __device__ __forceinline__ float value(bf16 stored) { return low(stored.bits); }
    static __device__ __forceinline__ u32 to_bits(bf16 stored) { return stored.bits; }
    static __device__ __forceinline__ bf16 from_bits(u32 bits) { return {(u16)bits}; }
    static __device__ __forceinline__ bf16 rounded(float value) { return {(u16)bf16_pair(value, 0.0f)}; }
};

template <>
struct Format<fp16> {
    static constexpr u32 MINUS_INFINITY = 0xFC00FC00u;
    static __device__ __forceinline__ float low(u32 word) { return fp16_value((u16)word); }
    static __device__ __forceinline__ float high(u32 word) { return fp16_value((u16)(word >> 16)); }
    static __device__ __forceinline__ u32 pair(float low, float high) { return fp16_pair(low, high); }
    static __device__ __forceinline__ u32 larger(u32 a, u32 b) { return fp16_larger(a, b); }
    static __device__ __forceinline__ float largest(u32 word) { return fmaxf(low(word), high(word)); }
    static __device__ __forceinline__ float value(fp16 stored) { return fp16_value(stored.bits); }
    static __device__ __forceinline__ u32 to_bits(fp16 stored) { return stored.bits; }
    static __device__ __forceinline__ fp16 from_bits(u32 bits) { return {(u16)bits}; }
    static __device__ __forceinline__ fp16 rounded(float value) { return {(u16)fp16_pair(value, 0.0f)}; }
};

template <>
struct Format<fp32> {
    static constexpr u32 MINUS_INFINITY = 0xFF800000u;
    static __device__ __forceinline__ u32 larger(u32 a, u32 b) { return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b))); }
    static __device__ __forceinline__ float largest(u32 word) { return __uint_as_float(word); }
    static __device__ __forceinline__ float value(fp32 stored) { return stored; }
    static __device__ __forceinline__ u32 to_bits(fp32 stored) { return __float_as_uint(stored); }
    static __device__ __forceinline__ fp32 from_bits(u32 bits) { return __uint_as_float(bits); }
    static __device__ __forceinline__ fp32 rounded(float value) { return value; }
};

// Sixteen bytes of T, and their values.
template <class T>
struct Vector {
    static constexpr int SIZE = 16 / sizeof(T);
    u32 words[4];

    static __device__ __forceinline__ Vector filled(u32 word) { return {{word, word, word, word}}; }
    static __device__ __forceinline__ Vector load(const T* address) {
        const uint4 raw = load_streaming(reinterpret_cast<const uint4*>(address));
        return {{raw.x, raw.y, raw.z, raw.w}};
    }
    __device__ __forceinline__ void store(T* address) const {
        store_streaming(reinterpret_cast<uint4*>(address), uint4{words[0], words[1], words[2], words[3]});
    }
    // One value, found by shifts: an array indexed by a variable would have to leave the registers.
    __device__ __forceinline__ T get(int i) const {
        constexpr int BITS = 8 * sizeof(T), PER_WORD = 32 / BITS;
        const int word = i / PER_WORD;
        const u32 bits = word == 0 ? words[0] : word == 1 ? words[1] : word == 2 ? words[2] : words[3];
        return Format<T>::from_bits(bits >> i % PER_WORD * BITS);
    }
    __device__ __forceinline__ void set(int i, T value) {
        constexpr int BITS = 8 * sizeof(T), PER_WORD = 32 / BITS;
        const int shift = i % PER_WORD * BITS;
        const u32 cleared = ~(0xFFFFFFFFu >> (32 - BITS) << shift), bits = Format<T>::to_bits(value) << shift;
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            if (word == i / PER_WORD) words[word] = (words[word] & cleared) | bits;
        }
    }
    __device__ __forceinline__ void unpack(float (&values)[SIZE]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (SIZE == 4) {
                values[i] = __uint_as_float(words[i]);
            } else {
                values[2 * i] = Format<T>::low(words[i]);
                values[2 * i + 1] = Format<T>::high(words[i]);
            }
        }
    }
    static __device__ __forceinline__ Vector pack(const float (&values)[SIZE]) {
        Vector packed;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (SIZE == 4) {
                packed.words[i] = __float_as_uint(values[i]);
            } else {
                packed.words[i] = Format<T>::pair(values[2 * i], values[2 * i + 1]);
            }
        }
        return packed;
    }
};
