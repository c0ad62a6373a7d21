// Cross-entropy + sparse KL and their gradient; the maths is in README.md, the host code in launch.py beside this file.
//
// Three stages for a vocabulary split over ranks: row_statistics (one read), combine (rows of scalars), gradient (in
// place, one read and one write). Or, where a cluster of blocks holds a row in registers, all of it in fused.
//
// A row is read as aligned vectors of 16 bytes, whatever its address: a position counts values from the aligned address
// at or below the row's first column, so position = column + offset, and the vectors at the ends are partial. Tiles of
// vectors all of whose values are real columns go a way of their own, without questions: there a logit costs five or six
// instructions (docs/results/kernels/predictions.md), and each question per vector would add half of one.
//
// s is a logit less the largest one known, q = softmax(z / tau); "kept" columns are those that a target names, where
// targets have a bucket for the others. The others' sums are relative to a maximum of their own: beside a kept column of
// which the student is sure they are less than fp32 holds, and the gradient needs their ratios.
//
// CAPPED kernels compute the loss of z' = cap tanh(z / cap), and its gradient by z: in all but the first and the last step
// a logit is z'. They are a source of their own in launch.py, and cost models without a cap nothing.
#pragma once
#include "../cuda/device.cuh"

namespace sparse_kd {

constexpr int MAX_CLUSTER = 8;
constexpr int TILE = 4;  // vectors that a thread has in flight
constexpr int KEPT = 8;  // vectors that a thread of fused keeps
constexpr int FUSED_THREADS = 512;
constexpr int THREADS = 512;

// Blocks of fused that a multiprocessor should hold: of two, one moves its row while the other waits for its cluster. That
// leaves 64 registers to a thread, half of them for its part of the row: too few, without a stack, but for the plain form
// of 16-bit logits on Hopper.
template <class T>
__host__ __device__ constexpr int fused_blocks(bool general) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
    return general || sizeof(T) > 2 ? 1 : 2;
#else
    return 1;
#endif
}

// Shapes: T rows, K entries. All arrays are contiguous but the logits. Mirrored in problem.py.
struct Arguments {
    void* logits;              // [T, columns] at row_stride; the gradient is written over them
    const i64* labels;         // [T], negative for none
    const void* ids;           // [T, K] i64 or i32, -1 for none
    const float* probs;        // [T, K]
    const float* floors;       // [T]; null for zero
    const float* buckets;      // [T]; null where the mode has none
    const float* kd_scales;    // [T]
    const float* grad_losses;  // at grad_stride; null for one
    float* statistics;         // [ranks, T, 9]
    float* picks;              // [T, 1 + K], the label's logit and the targets', where this rank has them
    float* scalars;            // [T, 8]
    float* subtracted;         // [T, 1 + K], see finish_row
    float* losses;             // [T]
    float* terms;              // [3, T]: cross-entropy, KL, lse^2
    i64 row_stride, grad_stride;
    i32 num_rows, num_columns, num_entries, num_ranks, rank, vocab_size, ids_are_wide, vectors_per_block;
    float ce_weight, z_loss, temperature, logit_cap;
};

// What a part of a row (a rank's, or a block's of a cluster) says of it, relative to its own maximum.
struct Statistics {
    float max;
    float sum;          // of exp(s)
    float inside;       // of exp(s / tau) at kept columns; 0 without buckets
    float outside_max;  // of the other columns
    float outside;      // of exp(s / tau) at them, s less their own maximum
    float total;        // of s; 0 without floors
    float label;        // s of the label
    float cross;        // sum of t s over the targets
    float mass;         // sum of t
};

// The gradient of some columns but for their entries: plain exp(s) + tempered exp(s / tau) - floor; s a logit - max.
struct Bulk {
    float max, plain, tempered;
};

struct RowScalars {
    Bulk outside, kept;  // the same without buckets
    float floor, is_active;
};

struct Entry {
    i32 id;
    float prob;
};

struct Settings {
    float inverse_tau, cap, inverse_cap;
    bool is_tempered, has_floor, has_bucket;
};

__device__ __forceinline__ Settings settings_of(const Arguments& a) {
    return {1.0f / a.temperature, a.logit_cap,          1.0f / a.logit_cap, a.temperature != 1.0f,
            a.floors != nullptr,  a.buckets != nullptr};
}

// A logit as the loss sees it; -inf, a column that does not count, stays.
template <bool CAPPED>
__device__ __forceinline__ float seen(float logit, const Settings& settings) {
    if (!CAPPED || logit == -infinity()) return logit;
    return settings.cap * tanhf(logit * settings.inverse_cap);
}

// Its derivative, 1 - (z' / cap)^2, from the logit seen; 0 at -inf.
template <bool CAPPED>
__device__ __forceinline__ float slope(float seen_logit, const Settings& settings) {
    if (!CAPPED) return 1.0f;
    const float share = seen_logit * settings.inverse_cap;
    return fmaxf(1.0f - share * share, 0.0f);
}

__device__ __forceinline__ float not_written() { return -infinity(); }

// The maximum as what logits are shifted by: a row of -inf is not shifted, or it would be NaN before its time.
__device__ __forceinline__ float anchor(float max) { return max == -infinity() ? 0.0f : max; }

__device__ __forceinline__ float x_log_x(float x) { return x == 0.0f ? 0.0f : x * logf(x); }

__device__ __forceinline__ i32 clamp(i32 value, i32 low, i32 high) {
    return value < low ? low : value > high ? high : value;
}

__device__ __forceinline__ i64 id_at(const Arguments& a, i64 row, i32 entry) {
    const i64 index = row * a.num_entries + entry;
    return a.ids_are_wide ? static_cast<const i64*>(a.ids)[index] : static_cast<const i32*>(a.ids)[index];
}

template <class T>
struct Row {
    static constexpr int SIZE = Vector<T>::SIZE;
    T* aligned;
    i32 offset, real_end, end;  // positions of the first column, past the real ones, past all
    i64 first_id;               // of the first column

    __device__ __forceinline__ Row(const Arguments& a, i64 row) {
        T* const first = static_cast<T*>(a.logits) + row * a.row_stride;
        offset = i32(((u64)first & 15) / sizeof(T));
        aligned = first - offset;
        first_id = i64(a.rank) * a.num_columns;
        const i64 real = a.vocab_size - first_id;
        real_end = offset + (real < 0 ? 0 : real < a.num_columns ? i32(real) : a.num_columns);
        end = offset + a.num_columns;
    }

    // Position of a vocabulary id within [begin, end), else -1.
    __device__ __forceinline__ i32 position_of(i64 id, i32 begin, i32 end) const {
        const i64 position = id - first_id + offset;
        const bool is_real = id >= 0 && position >= offset && position < real_end;
        return is_real && position >= begin && position < end ? i32(position) : -1;
    }

    __device__ __forceinline__ bool is_within(i32 position, i32 limit) const {
        return position >= offset && position + SIZE <= limit;
    }

    // Whether all values of the vectors [begin, end) are real columns.
    __device__ __forceinline__ bool are_whole(i32 begin, i32 end) const {
        return begin * SIZE >= offset && end * SIZE <= real_end;
    }

    // The vectors first, first + step, ...; `whole` as are_whole says. All loads are issued before the first is used:
    // their waits overlap, and the row is read at the memory's speed, not at its latency.
    template <int N>
    __device__ __forceinline__ void load(Vector<T> (&vectors)[N], i32 first, i32 step, bool whole) const {
        if (whole) {
#pragma unroll
            for (int i = 0; i < N; ++i) vectors[i] = Vector<T>::load(aligned + (first + i * step) * SIZE);
        } else {
#pragma unroll
            for (int i = 0; i < N; ++i) vectors[i] = load(first + i * step);
        }
    }

    // A vector; what is not a real column is -inf.
    __device__ __forceinline__ Vector<T> load(i32 vector) const {
        const i32 position = vector * SIZE;
        if (is_within(position, real_end)) return Vector<T>::load(aligned + position);
        // Unrolled: a value that is set by a variable would have to leave the registers, and its vector with it.
        Vector<T> partial = Vector<T>::filled(Format<T>::MINUS_INFINITY);
#pragma unroll
        for (int i = 0; i < SIZE; ++i) {
            if (position + i >= offset && position + i < real_end) partial.set(i, aligned[position + i]);
        }
        return partial;
    }

    // A bit per value of a vector: whether it is a real column.
    __device__ __forceinline__ u32 real_bits(i32 vector) const {
        const i32 position = vector * SIZE;
        const u32 before_end = (1u << clamp(real_end - position, 0, SIZE)) - 1;
        return before_end & ~((1u << clamp(offset - position, 0, SIZE)) - 1);
    }

    // The gradient of a vector's columns; zero at those that are padding.
    __device__ __forceinline__ void store(i32 vector, Vector<T> values) const {
        const i32 position = vector * SIZE;
        if (position >= real_end) values = Vector<T>::filled(0);
        if (is_within(position, position < real_end ? real_end : end)) return values.store(aligned + position);
#pragma unroll
        for (int i = 0; i < SIZE; ++i) {
            if (position + i < offset || position + i >= end) continue;
            aligned[position + i] = position + i < real_end ? values.get(i) : T{};
        }
    }
};

// exp(s), or exp(s / tau), as a power of two: 2^(z scale - shift), one multiply-add to a logit. The shift is max scale
// rounded; `correction`, the same for all logits, makes up for what the rounding left out.
struct Exponent {
    float scale, shift;

    // Not contracted with what is done to it, or it would not be the number that `correction` is of.
    __device__ __forceinline__ Exponent(float max, float scale) : scale(scale), shift(__fmul_rn(anchor(max), scale)) {}

    __device__ __forceinline__ float of(float logit) const { return exp2_approx(__fmaf_rn(logit, scale, -shift)); }

    __device__ __forceinline__ float correction(float max) const {
        return exp2_approx(-__fmaf_rn(anchor(max), scale, -shift));
    }
};

// Sums of exp(s) and exp(s / tau) over some columns, relative to the largest of them.
//
// They are kept as in an online softmax, so that one read is enough: the row's maximum is not known before the end, and
// sums relative to the largest logit so far neither overflow nor vanish. When a larger one comes, every term changes by
// the same factor, exp(z - new) = exp(z - old) exp(old - new), and so does their sum. The same step makes one of two
// parts' sums. All of it is in fp32: the terms are at most 1, and in bf16 a sum of 256 stays 256 whatever comes.
struct Sums {
    float max, plain, tempered;
};

__device__ __forceinline__ Sums no_sums() { return {-infinity(), 0.0f, 0.0f}; }

// Of no columns, sums.max is -inf and the sums are 0; exp(-inf) = 0 keeps them so.
template <bool GENERAL>
__device__ __forceinline__ void move_to(Sums& sums, float max, const Settings& settings) {
    const float distance = sums.max - anchor(max);
    sums.plain *= exp_approx(distance);
    if (GENERAL) sums.tempered *= exp_approx(distance * settings.inverse_tau);
    sums.max = max;
}

template <bool GENERAL>
__device__ __forceinline__ Sums merged(Sums a, Sums b, const Settings& settings) {
    const float max = fmaxf(a.max, b.max);
    move_to<GENERAL>(a, max, settings);
    move_to<GENERAL>(b, max, settings);
    return {max, a.plain + b.plain, a.tempered + b.tempered};
}

template <bool GENERAL>
__device__ __forceinline__ Sums from_lane(Sums sums, int distance) {
    Sums other = no_sums();
    other.max = __shfl_down_sync(ALL_LANES, sums.max, distance);
    other.plain = __shfl_down_sync(ALL_LANES, sums.plain, distance);
    if (GENERAL) other.tempered = __shfl_down_sync(ALL_LANES, sums.tempered, distance);
    return other;
}

// Of some columns. `total` is the sum of s, of which there are `count`, relative to the others' maximum: targets have a
// floor or a bucket.
struct Partial {
    Sums others, kept;
    float total, count;
};

__device__ __forceinline__ Partial nothing() { return {no_sums(), no_sums(), 0.0f, 0.0f}; }

template <bool GENERAL>
__device__ __forceinline__ Partial merged(Partial a, Partial b, const Settings& settings) {
    const Sums others = merged<GENERAL>(a.others, b.others, settings);
    if (!GENERAL) return {others, no_sums(), 0.0f, 0.0f};
    // Each of the `count` terms of a total is z less a maximum: relative to another one the total changes by their
    // distance, `count` times.
    const float base = anchor(others.max);
    return {
        others,
        merged<GENERAL>(a.kept, b.kept, settings),
        (a.total + a.count * (anchor(a.others.max) - base)) + (b.total + b.count * (anchor(b.others.max) - base)),
        a.count + b.count,
    };
}

// Moves a vector's kept columns, a bit each, to sums of their own. It is left with -inf there, which counts nowhere.
template <bool CAPPED, class T>
__device__ __forceinline__ void take_kept(Partial& partial, Vector<T>& vector, u32 kept, const Settings& settings) {
    if (kept == 0) return;
    // Unrolled, as in Row::load.
#pragma unroll
    for (int i = 0; i < Vector<T>::SIZE; ++i) {
        if ((kept >> i & 1) == 0) continue;
        const float logit = seen<CAPPED>(Format<T>::value(vector.get(i)), settings);
        partial.kept = merged<true>(partial.kept, {logit, 1.0f, 1.0f}, settings);
        vector.set(i, Format<T>::from_bits(Format<T>::MINUS_INFINITY));
    }
}

template <int N, class T>
__device__ __forceinline__ float largest(const Vector<T> (&vectors)[N]) {
    // Word by word: values of 16 bits are compared two at a time.
    u32 word = Format<T>::MINUS_INFINITY;
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) word = Format<T>::larger(word, vectors[i].words[j]);
    }
    return Format<T>::largest(word);
}

// Add the vectors first, first + step, ... of a row. Until `settled` the sums of the others are those of Exponent::of.
template <bool GENERAL, bool CAPPED, int N, class T>
__device__ __forceinline__ void accumulate(Partial& partial, const Vector<T> (&vectors)[N], const Row<T>& view,
                                           i32 first, i32 step, bool whole, const Settings& settings) {
    // The vectors' own maximum first: the sums are moved once per tile at most, and after the first few hardly ever,
    // where a comparison per value would cost an exponential each.
    Sums& others = partial.others;
    const float max = seen<CAPPED>(largest(vectors), settings);
    const float tempered_scale = LOG2_E * settings.inverse_tau;
    if (max > others.max) {
        if (GENERAL) partial.total += partial.count * (anchor(others.max) - anchor(max));
        // Of no columns the maximum is -inf, and 0 the factor of sums that are 0.
        others.plain *= exp2_approx(__fmul_rn(others.max, LOG2_E) - Exponent(max, LOG2_E).shift);
        if (GENERAL) {
            others.tempered *= exp2_approx(__fmul_rn(others.max, tempered_scale) - Exponent(max, tempered_scale).shift);
        }
        others.max = max;
    }
    const float base = anchor(others.max);
    const Exponent plain(others.max, LOG2_E), tempered(others.max, tempered_scale);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        float values[Vector<T>::SIZE];
        vectors[i].unpack(values);
        const u32 every = (1u << Vector<T>::SIZE) - 1;
        const u32 real = !GENERAL ? 0 : whole ? every : view.real_bits(first + i * step);
#pragma unroll
        for (int j = 0; j < Vector<T>::SIZE; ++j) {
            const float logit = seen<CAPPED>(values[j], settings);
            const float exponential = plain.of(logit);
            others.plain += exponential;
            if (!GENERAL) continue;
            others.tempered += settings.is_tempered ? tempered.of(logit) : exponential;
            if (settings.has_floor && (real >> j & 1)) partial.total += logit - base;
        }
        if (GENERAL) partial.count += float(__popc(real));
    }
}

// The sums of `accumulate`, relative to their maximum itself.
template <bool GENERAL>
__device__ __forceinline__ Partial settled(Partial partial, const Settings& settings) {
    Sums& others = partial.others;
    others.plain *= Exponent(others.max, LOG2_E).correction(others.max);
    if (GENERAL) others.tempered *= Exponent(others.max, LOG2_E * settings.inverse_tau).correction(others.max);
    return partial;
}

template <bool GENERAL>
__device__ __forceinline__ Partial warp_merged(Partial partial, const Settings& settings) {
#pragma unroll
    for (int distance = WARP_SIZE / 2; distance > 0; distance /= 2) {
        Partial other = nothing();
        other.others = from_lane<GENERAL>(partial.others, distance);
        if (GENERAL) {
            other.kept = from_lane<GENERAL>(partial.kept, distance);
            other.total = __shfl_down_sync(ALL_LANES, partial.total, distance);
            other.count = __shfl_down_sync(ALL_LANES, partial.count, distance);
        }
        partial = merged<GENERAL>(partial, other, settings);
    }
    return partial;  // lane 0's is the warp's
}

// Of all threads' partials; complete in the first thread only. `shared` has room for one of each warp.
template <bool GENERAL>
__device__ __forceinline__ Partial block_merged(Partial partial, Partial* shared, const Settings& settings) {
    const int thread = threadIdx.x;
    partial = warp_merged<GENERAL>(partial, settings);
    if (thread % WARP_SIZE == 0) shared[thread / WARP_SIZE] = partial;
    __syncthreads();
    if (thread >= WARP_SIZE) return partial;
    partial = thread < int(blockDim.x) / WARP_SIZE ? shared[thread] : nothing();
    return warp_merged<GENERAL>(partial, settings);
}

// Set the bits of the kept columns among the positions [begin, end), with begin a multiple of 32.
template <class T>
__device__ __forceinline__ void mark_kept(u32* bits, const Arguments& a, i64 row, const Row<T>& view, i32 begin,
                                          i32 end) {
    for (i32 word = threadIdx.x; word * 32 < end - begin; word += blockDim.x) bits[word] = 0;
    __syncthreads();
    for (i32 entry = threadIdx.x; entry < a.num_entries; entry += blockDim.x) {
        const i32 position = view.position_of(id_at(a, row, entry), begin, end);
        if (position >= 0) atomicOr(&bits[(position - begin) / 32], 1u << (position - begin) % 32);
    }
    __syncthreads();
}

template <class T>
__device__ __forceinline__ u32 kept_bits(const u32* bits, i32 vector) {
    const i32 first = vector * Vector<T>::SIZE;
    return bits[first / 32] >> first % 32 & ((1u << Vector<T>::SIZE) - 1);
}

// Logits of the label and of the targets at positions [begin, end), as the loss sees them; 0 for the others.
template <bool CAPPED, class T>
__device__ __forceinline__ void pick(float* picks, const Arguments& a, i64 row, const Row<T>& view, i32 begin, i32 end,
                                     const Settings& settings) {
    for (i32 i = threadIdx.x; i <= a.num_entries; i += blockDim.x) {
        const i64 id = i == 0 ? a.labels[row] : id_at(a, row, i - 1);
        const i32 position = view.position_of(id, begin, end);
        picks[i] = position < 0 ? 0.0f : seen<CAPPED>(Format<T>::value(view.aligned[position]), settings);
    }
}

// The first lane's.
template <bool GENERAL>
__device__ __forceinline__ Sums broadcast(Sums sums) {
    Sums first = no_sums();
    first.max = __shfl_sync(ALL_LANES, sums.max, 0);
    first.plain = __shfl_sync(ALL_LANES, sums.plain, 0);
    first.tempered = GENERAL ? __shfl_sync(ALL_LANES, sums.tempered, 0) : first.plain;
    return first;
}

// The statistics of positions [begin, end) from the block's partial; by the first warp, complete in all its lanes.
template <bool GENERAL, class T>
__device__ __forceinline__ Statistics statistics_of(Partial partial, const float* picks, const Arguments& a, i64 row,
                                                    const Row<T>& view, i32 begin, i32 end, const Settings& settings) {
    const Sums others = broadcast<GENERAL>(partial.others);
    Sums whole = others, kept = no_sums();
    if (GENERAL) {
        kept = broadcast<GENERAL>(partial.kept);
        whole = merged<GENERAL>(others, kept, settings);
        move_to<GENERAL>(kept, whole.max, settings);
    }
    const float base = anchor(whole.max);
    float cross = 0.0f, mass = 0.0f;
    for (i32 entry = threadIdx.x; entry < a.num_entries; entry += WARP_SIZE) {
        const float prob = a.probs[row * a.num_entries + entry];
        if (prob == 0.0f || view.position_of(id_at(a, row, entry), begin, end) < 0) continue;
        cross += prob * (picks[1 + entry] - base);
        mass += prob;
    }
    const bool has_label = view.position_of(a.labels[row], begin, end) >= 0;
    return {
        whole.max,
        whole.plain,
        kept.tempered,
        others.max,
        others.tempered,
        GENERAL ? __shfl_sync(ALL_LANES, partial.total, 0) : 0.0f,
        has_label ? picks[0] - base : 0.0f,
        warp_sum(cross),
        warp_sum(mass),
    };
}

// Whether the ids ascend, padding last, as a cache stores them: then none is there twice, and merge_entries need not
// compare every entry with every other. All lanes of the warp get the answer.
__device__ __forceinline__ bool ascends(const Entry* entries, i32 num_entries) {
    bool holds = true;
    for (i32 i = threadIdx.x % WARP_SIZE; i + 1 < num_entries; i += WARP_SIZE) {
        const i32 id = entries[i].id, next = entries[i + 1].id;
        holds = holds && (next < 0 || (id >= 0 && id < next));
    }
    return __all_sync(ALL_LANES, holds);
}

// The probability of each id at its first entry, where duplicates add up; -1 at entries that are none.
__device__ __forceinline__ void merge_entries(float* probs, const Entry* entries, i32 num_entries, i32 thread,
                                              i32 num_threads) {
    const bool are_distinct = ascends(entries, num_entries);
    for (i32 i = thread; i < num_entries; i += num_threads) {
        const i32 id = entries[i].id;
        float prob = entries[i].prob;
        bool is_first = id >= 0;
        if (is_first && !are_distinct) {
            prob = 0.0f;
            for (i32 j = 0; j < num_entries; ++j) {
                if (entries[j].id != id) continue;
                prob += entries[j].prob;
                if (j < i) is_first = false;
            }
        }
        probs[i] = is_first ? prob : -1.0f;
    }
}

__device__ __forceinline__ void read_entries(Entry* entries, const Arguments& a, i64 row, i32 thread, i32 num_threads) {
    for (i32 i = thread; i < a.num_entries; i += num_threads) {
        const i64 id = id_at(a, row, i);
        // Beyond the vocabulary an id is not cut to 32 bits, or it would be another's: finish_row makes the row NaN.
        entries[i] = {id < a.vocab_size ? i32(id < 0 ? -1 : id) : a.vocab_size, a.probs[row * a.num_entries + i]};
    }
}

// How a row is cut into parts: part i has positions [i width, (i + 1) width).
struct Parts {
    const Statistics* first;
    i64 stride;
    i32 number, width, offset;

    __device__ __forceinline__ i32 columns_before(i32 part, i32 vocab_size) const {
        return clamp(part * width - offset, 0, vocab_size);
    }
};

// All parts' statistics as one, and the label's part. Part by part in their order, not as a tree over lanes: sums of
// floats depend on their order, and ranks that disagreed in a bit of a row's scalars would train different models.
__device__ __forceinline__ Statistics all_parts(const Parts& parts, i64 label, i32 vocab_size, float inverse_tau) {
    Statistics whole = {-infinity(), 0.0f, 0.0f, -infinity(), 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    for (i32 i = 0; i < parts.number; ++i) {
        whole.max = fmaxf(whole.max, parts.first[i * parts.stride].max);
        whole.outside_max = fmaxf(whole.outside_max, parts.first[i * parts.stride].outside_max);
    }
    const float base = anchor(whole.max), outside_base = anchor(whole.outside_max);
    const i32 label_part = label < 0 ? -1 : i32((label + parts.offset) / parts.width);
    for (i32 i = 0; i < parts.number; ++i) {
        const Statistics part = parts.first[i * parts.stride];
        const float scale = exp_approx(part.max - base);
        const float inside_scale = exp_approx((part.max - base) * inverse_tau);
        const float outside_scale = exp_approx((part.outside_max - outside_base) * inverse_tau);
        // What was z - part.max becomes z - whole.max: for each of the part's columns, and each unit of target mass.
        const float moved = anchor(part.max) - base;
        const i32 columns = parts.columns_before(i + 1, vocab_size) - parts.columns_before(i, vocab_size);
        whole.sum += part.sum * scale;
        whole.inside += part.inside * inside_scale;
        whole.outside += part.outside * outside_scale;
        whole.total += part.total + columns * moved;
        whole.cross += part.cross + part.mass * moved;
        if (i == label_part) whole.label = part.label + moved;
    }
    if (label >= vocab_size) whole.label = not_a_number();
    return whole;
}

// By one warp: a row's scalars (in all lanes), its loss and terms if `reports`, and what its entries subtract from the
// gradient [1 + K]: at the label, unless it is kept, then at each id's first entry; not_written() elsewhere.
__device__ __forceinline__ RowScalars finish_row(const Arguments& a, i64 row, const Parts& parts, const Entry* entries,
                                                 const float* probs, float* subtracted, bool reports) {
    const i32 lane = threadIdx.x % WARP_SIZE;
    const float inverse_tau = 1.0f / a.temperature;
    const i64 label = a.labels[row];
    const bool has_label = label >= 0;
    const Statistics whole = all_parts(parts, label, a.vocab_size, inverse_tau);
    const float floor = a.floors ? a.floors[row] : 0.0f;
    const float bucket = a.buckets ? a.buckets[row] : 0.0f;
    const float kd_scale = a.num_entries > 0 ? a.kd_scales[row] : 0.0f;
    const float at_target = kd_scale * inverse_tau;

    float mass = 0.0f, entropy = 0.0f;
    i32 num_kept = 0;
    bool label_is_kept = false;
    for (i32 i = lane; i < a.num_entries; i += WARP_SIZE) {
        const float prob = probs[i];
        const bool is_label = has_label && entries[i].id == label;
        const bool is_kept = prob >= 0.0f;
        subtracted[1 + i] = is_kept ? at_target * prob + (is_label ? a.ce_weight : 0.0f) : not_written();
        if (!is_kept) continue;
        mass += prob;
        entropy += entries[i].id < a.vocab_size ? x_log_x(prob + floor) : not_a_number();
        ++num_kept;
        label_is_kept = label_is_kept || is_label;
    }
    mass = warp_sum(mass);
    entropy = warp_sum(entropy);
    num_kept = warp_sum(num_kept);
    label_is_kept = __any_sync(ALL_LANES, label_is_kept);
    if (lane == 0) subtracted[0] = has_label && !label_is_kept ? a.ce_weight : not_written();

    const float log_sum = logf(whole.sum);
    const float lse = has_label ? anchor(whole.max) + log_sum : 0.0f;
    // What takes the others' sums to the row's maximum; without buckets 0 and 1.
    const float distance = whole.outside_max - anchor(whole.max);
    const float lowered = exp_approx(distance), tempered_lowered = exp_approx(distance * inverse_tau);
    const float tempered_sum = whole.inside + whole.outside * tempered_lowered;
    const bool has_targets = num_kept > 0 || floor > 0.0f;
    if (reports && lane == 0) {
        const float ce = has_label ? log_sum - whole.label : 0.0f;
        float kl = 0.0f;
        // sum_j T_j (log T_j - log q_j), log q_j = s_j / tau - log_tempered_sum: the sum of T log T, T = t + u at the
        // kept ids and u at the others, less that of t s / tau and of u s / tau, plus log_tempered_sum for each mass.
        // The bucket R adds R (log R - log Q), Q the student's mass outside,
        // tempered_lowered outside / tempered_sum.
        if (has_targets) {
            const float log_tempered_sum = logf(tempered_sum);
            kl = entropy + mass * log_tempered_sum - whole.cross * inverse_tau;
            if (floor > 0.0f) {
                kl += (a.vocab_size - num_kept) * x_log_x(floor);
                kl -= floor * (whole.total * inverse_tau - a.vocab_size * log_tempered_sum);
            }
            if (bucket > 0.0f) {
                kl += x_log_x(bucket) - bucket * (distance * inverse_tau + logf(whole.outside) - log_tempered_sum);
            }
        }
        a.losses[row] = a.ce_weight * ce + kd_scale * kl + a.z_loss * lse * lse;
        a.terms[row] = ce;
        a.terms[a.num_rows + row] = kl;
        a.terms[2 * i64(a.num_rows) + row] = lse * lse;
    }

    const Bulk none = {anchor(whole.max), 0.0f, 0.0f};
    RowScalars scalars = {none, none, 0.0f, has_label || has_targets ? 1.0f : 0.0f};
    scalars.outside.max = anchor(whole.outside_max);
    if (has_label) {
        scalars.kept.plain = (a.ce_weight + 2.0f * a.z_loss * lse) / whole.sum;
        scalars.outside.plain = scalars.kept.plain * lowered;
    }
    if (has_targets) {
        const float target_mass = mass + a.vocab_size * floor;
        // Outside, q_j is tempered_lowered exp(s_o / tau) / tempered_sum and its coefficient M - R P_K / (1 - P_K), with
        // P_K = inside / tempered_sum and 1 - P_K = tempered_lowered outside / tempered_sum: in R's term
        // tempered_lowered, which may be 0, cancels.
        // Where there are other columns, one of them is exp(0) of the sum.
        const float odds = whole.inside / fmaxf(whole.outside, 1.0f);
        scalars.outside.tempered = at_target * (target_mass * tempered_lowered - bucket * odds) / tempered_sum;
        scalars.kept.tempered = at_target * (target_mass + bucket) / tempered_sum;
        scalars.floor = at_target * floor;
    }
    return scalars;
}

// The scalars of columns that no entry names, times the incoming gradient; zeros where the row takes no part, whatever
// comes in. What the entries need is read when the bulk is written: it would take registers until then.
struct BulkScalars {
    Bulk bulk;
    float floor, is_active;
};

__device__ __forceinline__ Bulk times(Bulk bulk, float incoming) {
    return {bulk.max, bulk.plain * incoming, bulk.tempered * incoming};
}

__device__ __forceinline__ BulkScalars bulk_of(const RowScalars& scalars, float incoming) {
    if (scalars.is_active == 0.0f) return {{0.0f, 0.0f, 0.0f}, 0.0f, 0.0f};
    return {times(scalars.outside, incoming), scalars.floor * incoming, 1.0f};
}

__device__ __forceinline__ float incoming_gradient(const Arguments& a, i64 row) {
    return a.grad_losses ? a.grad_losses[row * a.grad_stride] : 1.0f;
}

// A bulk's gradient as a function of the logit.
struct Curve {
    Exponent plain_exponent, tempered_exponent;
    float plain, tempered, floor;

    __device__ __forceinline__ Curve(const Bulk& bulk, float floor, const Settings& settings)
        : plain_exponent(bulk.max, LOG2_E),
          tempered_exponent(bulk.max, LOG2_E * settings.inverse_tau),
          plain(bulk.plain * plain_exponent.correction(bulk.max)),
          tempered(bulk.tempered * tempered_exponent.correction(bulk.max)),
          floor(floor) {}

    template <bool GENERAL>
    __device__ __forceinline__ float at(float logit, const Settings& settings) const {
        const float exponential = plain_exponent.of(logit);
        if (!GENERAL) return (plain + tempered) * exponential;
        const float other = settings.is_tempered ? tempered_exponent.of(logit) : exponential;
        return plain * exponential + tempered * other - floor;
    }
};

template <bool GENERAL, bool CAPPED, class T>
__device__ __forceinline__ Vector<T> gradient_of(const Vector<T>& vector, const Curve& curve,
                                                 const Settings& settings) {
    float values[Vector<T>::SIZE];
    vector.unpack(values);
#pragma unroll
    for (int i = 0; i < Vector<T>::SIZE; ++i) {
        const float logit = seen<CAPPED>(values[i], settings);
        values[i] = curve.at<GENERAL>(logit, settings);
        if (CAPPED) values[i] *= slope<CAPPED>(logit, settings);
    }
    return Vector<T>::pack(values);
}

// Overwrite the columns at positions [begin, end) that the label and the targets name. Never corrected from the bulk,
// which is already rounded, and at kept columns relative to another maximum: it may be infinite there.
template <bool GENERAL, bool CAPPED, class T>
__device__ __forceinline__ void write_entries(const Arguments& a, i64 row, const Row<T>& view, i32 begin, i32 end,
                                              const float* picks, const float* subtracted, const RowScalars& scalars,
                                              float incoming, const Settings& settings) {
    const BulkScalars outside = bulk_of(scalars, incoming);
    if (outside.is_active == 0.0f) return;
    for (i32 i = threadIdx.x; i <= a.num_entries; i += blockDim.x) {
        const float taken = subtracted[i];
        const i64 id = i == 0 ? a.labels[row] : id_at(a, row, i - 1);
        const i32 position = view.position_of(id, begin, end);
        if (position < 0 || taken == not_written()) continue;
        const Bulk columns = GENERAL && i > 0 ? times(scalars.kept, incoming) : outside.bulk;
        const float bulk = Curve(columns, outside.floor, settings).at<GENERAL>(picks[i], settings);
        const float gradient = bulk - taken * incoming;
        view.aligned[position] =
            Format<T>::rounded(CAPPED ? gradient * slope<CAPPED>(picks[i], settings) : gradient);
    }
}

// A block per row. Shared memory: 32 Partials; with buckets, a bit per position.
template <class T, bool GENERAL, bool CAPPED = false>
__global__ void __launch_bounds__(THREADS, GENERAL ? 2 : 3) row_statistics(const Arguments a) {
    SHARED_MEMORY(shared);
    Partial* const partials = reinterpret_cast<Partial*>(shared);
    u32* const kept = reinterpret_cast<u32*>(partials + WARP_SIZE);
    const i64 row = blockIdx.x;
    const i32 thread = threadIdx.x, num_threads = blockDim.x;
    const Row<T> view(a, row);
    const Settings settings = settings_of(a);
    const i32 end = view.real_end > view.offset ? view.real_end : 0;
    const i32 num_vectors = (end + Vector<T>::SIZE - 1) / Vector<T>::SIZE;
    float* const picks = a.picks + row * (1 + a.num_entries);
    pick<CAPPED>(picks, a, row, view, 0, end, settings);
    if (GENERAL && settings.has_bucket) mark_kept(kept, a, row, view, 0, end);

    Partial partial = nothing();
    for (i32 tile = 0; tile < num_vectors; tile += TILE * num_threads) {
        const bool whole = view.are_whole(tile, tile + TILE * num_threads);
        const i32 first = tile + thread;
        Vector<T> loaded[TILE];
        view.load(loaded, first, num_threads, whole);
        if (GENERAL && settings.has_bucket) {
#pragma unroll
            for (int i = 0; i < TILE; ++i) {
                const i32 vector = first + i * num_threads;
                const u32 kept_here = vector < num_vectors ? kept_bits<T>(kept, vector) : 0;
                take_kept<CAPPED>(partial, loaded[i], kept_here, settings);
            }
        }
        accumulate<GENERAL, CAPPED>(partial, loaded, view, first, num_threads, whole, settings);
    }
    partial = settled<GENERAL>(partial, settings);
    partial = block_merged<GENERAL>(partial, partials, settings);
    if (thread >= WARP_SIZE) return;
    const Statistics statistics = statistics_of<GENERAL>(partial, picks, a, row, view, 0, end, settings);
    if (thread == 0) reinterpret_cast<Statistics*>(a.statistics)[row] = statistics;
}

// A warp per row. Shared memory: K Entries and K floats of each warp.
__global__ void __launch_bounds__(THREADS) combine(const Arguments a) {
    SHARED_MEMORY(shared);
    const i32 warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE, num_warps = blockDim.x / WARP_SIZE;
    const i64 row = i64(blockIdx.x) * num_warps + warp;
    if (row >= a.num_rows) return;
    Entry* const entries = reinterpret_cast<Entry*>(shared) + warp * a.num_entries;
    float* const probs = reinterpret_cast<float*>(reinterpret_cast<Entry*>(shared) + num_warps * a.num_entries) +
                         warp * a.num_entries;
    read_entries(entries, a, row, lane, WARP_SIZE);
    __syncwarp();
    merge_entries(probs, entries, a.num_entries, lane, WARP_SIZE);
    const Parts parts = {reinterpret_cast<const Statistics*>(a.statistics) + row, a.num_rows, a.num_ranks,
                         a.num_columns, 0};
    float* const subtracted = a.subtracted + row * (1 + a.num_entries);
    const RowScalars scalars = finish_row(a, row, parts, entries, probs, subtracted, true);
    if (lane == 0) reinterpret_cast<RowScalars*>(a.scalars)[row] = scalars;
}

// A block per row (x) and chunk of vectors_per_block vectors (y).
template <class T, bool GENERAL, bool CAPPED = false>
__global__ void __launch_bounds__(THREADS) gradient(const Arguments a) {
    const i64 row = blockIdx.x;
    const i32 thread = threadIdx.x, num_threads = blockDim.x;
    const Row<T> view(a, row);
    const Settings settings = settings_of(a);
    const float incoming = incoming_gradient(a, row);
    const RowScalars& row_scalars = reinterpret_cast<const RowScalars*>(a.scalars)[row];
    const BulkScalars scalars = bulk_of(row_scalars, incoming);
    const i32 begin = blockIdx.y * a.vectors_per_block;
    const i32 num_vectors = (view.end + Vector<T>::SIZE - 1) / Vector<T>::SIZE;
    const i32 end = begin + a.vectors_per_block < num_vectors ? begin + a.vectors_per_block : num_vectors;
    const Curve curve(scalars.bulk, scalars.floor, settings);
    for (i32 tile = begin; tile < end; tile += TILE * num_threads) {
        const i32 first = tile + thread, past = tile + TILE * num_threads;
        if (scalars.is_active != 0.0f && past <= end && view.are_whole(tile, past)) {
            Vector<T> loaded[TILE];
            view.load(loaded, first, num_threads, true);
#pragma unroll
            for (int i = 0; i < TILE; ++i) {
                const Vector<T> values = gradient_of<GENERAL, CAPPED>(loaded[i], curve, settings);
                values.store(view.aligned + (first + i * num_threads) * Vector<T>::SIZE);
            }
            continue;
        }
#pragma unroll 1
        for (i32 vector = first; vector < end && vector < past; vector += num_threads) {
            // A row that takes no part is not read: what is there may be NaN.
            const Vector<T> loaded = scalars.is_active != 0.0f ? view.load(vector) : Vector<T>::filled(0);
            view.store(vector, gradient_of<GENERAL, CAPPED>(loaded, curve, settings));
        }
    }
    __syncthreads();
    const i64 first_pick = row * (1 + a.num_entries);
    write_entries<GENERAL, CAPPED>(a, row, view, begin * Vector<T>::SIZE, end * Vector<T>::SIZE, a.picks + first_pick,
                                   a.subtracted + first_pick, row_scalars, incoming, settings);
}

// A cluster per row, which it holds in registers: loss, and the gradient over the logits, in one read and one write.
// Shared memory: 32 x KEPT vectors, K Entries, 8 Statistics, 32 Partials, RowScalars, 3 K + 2 floats; with buckets, a bit
// per position.
template <class T, bool GENERAL, bool CAPPED = false>
__global__ void __launch_bounds__(FUSED_THREADS, fused_blocks<T>(GENERAL)) fused(const Arguments a) {
    constexpr int SIZE = Vector<T>::SIZE;
    cluster_arrive();  // a block's shared memory may be written once the block has started: waited for below
    SHARED_MEMORY(shared);
    Vector<T>* const held = reinterpret_cast<Vector<T>*>(shared);
    Entry* const entries = reinterpret_cast<Entry*>(held + WARP_SIZE * KEPT);
    Statistics* const statistics = reinterpret_cast<Statistics*>(entries + a.num_entries);
    Partial* const partials = reinterpret_cast<Partial*>(statistics + MAX_CLUSTER);
    RowScalars* const shared_scalars = reinterpret_cast<RowScalars*>(partials + WARP_SIZE);
    float* const picks = reinterpret_cast<float*>(shared_scalars + 1);
    float* const subtracted = picks + 1 + a.num_entries;
    float* const probs = subtracted + 1 + a.num_entries;
    u32* const kept = reinterpret_cast<u32*>(probs + a.num_entries);

    const i32 thread = threadIdx.x, num_threads = blockDim.x;
    const i32 rank = cluster_rank(), num_blocks = cluster_size();
    const i64 row = blockIdx.x / num_blocks;
    const Row<T> view(a, row);
    const Settings settings = settings_of(a);
    const i32 width = num_threads * KEPT * SIZE, begin = rank * width, end = begin + width;
    const i32 first = begin / SIZE + thread;
    const bool whole = view.are_whole(begin / SIZE, end / SIZE);
    Vector<T> loaded[KEPT];
    view.load(loaded, first, num_threads, whole);

    pick<CAPPED>(picks, a, row, view, begin, end, settings);
    read_entries(entries, a, row, thread, num_threads);
    if (GENERAL && settings.has_bucket) mark_kept(kept, a, row, view, begin, end);
    __syncthreads();
    merge_entries(probs, entries, a.num_entries, thread, num_threads);

    Partial partial = nothing();
    if (GENERAL && settings.has_bucket) {
#pragma unroll
        for (int i = 0; i < KEPT; ++i) {
            take_kept<CAPPED>(partial, loaded[i], kept_bits<T>(kept, thread + i * num_threads), settings);
        }
    }
    accumulate<GENERAL, CAPPED>(partial, loaded, view, first, num_threads, whole, settings);
    partial = settled<GENERAL>(partial, settings);
    // The first warp finishes the row for all: for that it needs the registers which its part of the row takes.
    if (thread < WARP_SIZE) {
#pragma unroll
        for (int i = 0; i < KEPT; ++i) held[i * WARP_SIZE + thread] = loaded[i];
    }
    partial = block_merged<GENERAL>(partial, partials, settings);
    cluster_wait();
    if (thread < WARP_SIZE) {
        // Every block gets every block's statistics and finishes the row itself, in the same order: one exchange, and no
        // second one to hand out the result.
        const Statistics mine = statistics_of<GENERAL>(partial, picks, a, row, view, begin, end, settings);
        if (thread < num_blocks) *map_shared(statistics + rank, thread) = mine;
    }
    cluster_synchronise();
    if (thread < WARP_SIZE) {
        const Parts parts = {statistics, 1, num_blocks, width, view.offset};
        const RowScalars scalars = finish_row(a, row, parts, entries, probs, subtracted, rank == 0);
        if (thread == 0) *shared_scalars = scalars;
#pragma unroll
        for (int i = 0; i < KEPT; ++i) loaded[i] = held[i * WARP_SIZE + thread];
    }
    __syncthreads();
    const float incoming = incoming_gradient(a, row);
    const BulkScalars scalars = bulk_of(*shared_scalars, incoming);
    const Curve curve(scalars.bulk, scalars.floor, settings);
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
        const i32 vector = first + i * num_threads;
        if (scalars.is_active == 0.0f) loaded[i] = Vector<T>::filled(0);
        const Vector<T> values = gradient_of<GENERAL, CAPPED>(loaded[i], curve, settings);
        if (whole) {
            values.store(view.aligned + vector * SIZE);
        } else if (vector * SIZE < view.end) {
            view.store(vector, values);
        }
    }
    __syncthreads();
    write_entries<GENERAL, CAPPED>(a, row, view, begin, end, picks, subtracted, *shared_scalars, incoming, settings);
}

}  // namespace sparse_kd
