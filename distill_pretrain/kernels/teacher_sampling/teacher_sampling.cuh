// Sparse targets from a teacher's logits, the bits of the numpy samplers; the maths and the buffers are in README.md.
#pragma once
#include "../cuda/device.cuh"

namespace teacher_sampling {

constexpr int BLOCK_COLUMNS = 256;
constexpr int LANE_COLUMNS = BLOCK_COLUMNS / WARP_SIZE;
constexpr int NO_COLUMN = 0x7fffffff;
// Philox streams of the samplers.
constexpr u32 MULTINOMIAL = 0;
constexpr u32 SYSTEMATIC = 1;

// Some rows of a matrix of logits.
struct Rows {
    const void* logits;
    const i64* numbers;  // [count], of the rows
    const float* maxima;     // [count], over all ranks
    i64 stride;          // elements from one row to the next
    i32 columns;         // of this rank
    i32 count;
};

struct WeighArguments {
    Rows rows;
    u64* before;  // [count, blocks + 1]: weight of the columns before each block, and of all
};

struct DrawArguments {
    Rows rows;
    const u64* before;
    const u64* positions;  // [count]
    const i64* below;       // [count], weight of the ids before this rank's
    const i64* totals;      // [count], weight of all ids
    i32* lengths;           // [count], distinct columns of a row
    i32* columns;           // [count, draws], the first lengths[row] of a row
    i32* counts;            // [count, draws]
    u64 seed;
    u32 stream;
    i32 draws;
    i32 slots;  // the power of two that draws fit in
    i32 unused;
};

struct SelectArguments {
    Rows rows;
    const float* thresholds;  // [count], the k-th largest logit of a row
    i32* lengths;         // [count]
    i32* columns;         // [count, k], the first lengths[row] of a row
    float* values;            // [count, k]
    i64* weights;         // [count, k]
    i32 k;
    i32 unused;
};

struct LookArguments {
    Rows rows;
    double* depths;  // [count], sum of weight * (maximum - logit)
    i32* top;    // [count], column of the largest logit, the lowest of equals
};

__device__ __forceinline__ int lane_number() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp_number() { return threadIdx.x >> 5; }
__device__ __forceinline__ int num_warps() { return blockDim.x >> 5; }
__device__ __forceinline__ int num_blocks(const Rows& rows) {
    return (rows.columns + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
}

template <class T>
__device__ __forceinline__ const T* row_start(const Rows& rows, int row) {
    return static_cast<const T*>(rows.logits) + rows.numbers[row] * rows.stride;
}

// floor(2^(40 - n) P(f)) of d = (maximum - logit) log2 e, n = floor(d), f = d - n: softmax relative to its maximum, as
// 2^-d = 2^-n 2^-f, with P the polynomial of 2^-f scaled by 2^40. Every operation is rounded on its own: a fused
// multiply-add would give other bits than numpy, and then other draws than a capture on the host.
__device__ __forceinline__ u64 integer_weight(float logit, float maximum) {
    const float distance = __fmul_rn(__fsub_rn(maximum, logit), LOG2_E);
    // From 41 binary orders down the weight is 0. What is no number counts as such; its row is refused elsewhere.
    const float depth = distance < 41.0f ? distance : 41.0f;
    const int whole = int(depth);
    const float part = __fsub_rn(depth, static_cast<float>(whole));
    float value = __fmul_rn(0x1.e243bep+26f, part);
    value = __fmul_rn(__fadd_rn(value, -0x1.52a284p+30f), part);
    value = __fmul_rn(__fadd_rn(value, 0x1.3a7ae4p+33f), part);
    value = __fmul_rn(__fadd_rn(value, -0x1.c6a66cp+35f), part);
    value = __fmul_rn(__fadd_rn(value, 0x1.ebfbaap+37f), part);
    value = __fmul_rn(__fadd_rn(value, -0x1.62e430p+39f), part);
    value = __fadd_rn(value, 0x1p+40f);
    // value has the exponent of 2^38 to 2^40, so that the mantissa's 24 bits are shifted by 0 to 43 places.
    const u32 bits = __float_as_uint(value);
    const u64 mantissa = (bits & 0x7fffffu) | 0x800000u;
    return (mantissa << 17) >> (127 + 40 - int(bits >> 23) + whole);
}

// Sum over this lane and those before it.
__device__ __forceinline__ u64 warp_inclusive_sum(u64 value) {
#pragma unroll
    for (int distance = 1; distance < 32; distance <<= 1) {
        const u64 other = __shfl_up_sync(ALL_LANES, value, distance);
        if (lane_number() >= distance) value += other;
    }
    return value;
}

// sums[0 .. count) become the sums before each, and sums[count] that of all; by one warp.
__device__ __forceinline__ void exclusive_scan(u64* sums, int count) {
    u64 running = 0;
    for (int first = 0; first < count; first += 32) {
        const int index = first + lane_number();
        const u64 own = index < count ? sums[index] : 0;
        const u64 inclusive = warp_inclusive_sum(own);
        if (index < count) sums[index] = running + inclusive - own;
        running += __shfl_sync(ALL_LANES, inclusive, 31);
    }
    if (lane_number() == 0) sums[count] = running;
}

// This lane's logits of a block: a stretch of consecutive columns. What lies beyond the row is -inf.
template <class T>
__device__ __forceinline__ void lane_logits(const T* row, int columns, int block,
                                            float (&logits)[LANE_COLUMNS]) {
    const int first = block * BLOCK_COLUMNS + lane_number() * LANE_COLUMNS;
    const T* start = row + first;
    if (first + LANE_COLUMNS <= columns && reinterpret_cast<u64>(start) % sizeof(uint4) == 0) {
        constexpr int SIZE = Vector<T>::SIZE;
#pragma unroll
        for (int i = 0; i < LANE_COLUMNS; i += SIZE) {
            float some[SIZE];
            Vector<T>::load(start + i).unpack(some);
#pragma unroll
            for (int j = 0; j < SIZE; j++) logits[i + j] = some[j];
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < LANE_COLUMNS; i++) {
        logits[i] = first + i < columns ? Format<T>::value(start[i]) : -infinity();
    }
}

// A block per row, a warp per block of columns. The weights themselves are not kept, 8 bytes for each logit of 2 or 4:
// draws need the sums before each block of columns alone, and weigh the one block that they fall into again.
template <class T>
__global__ void __launch_bounds__(256) weigh(WeighArguments arguments) {
    SHARED_MEMORY(shared);
    u64* before = reinterpret_cast<u64*>(shared);
    const Rows& rows = arguments.rows;
    const int row = blockIdx.x, blocks = num_blocks(rows);
    const T* logits = row_start<T>(rows, row);
    const float maximum = rows.maxima[row];
    for (int block = warp_number(); block < blocks; block += num_warps()) {
        float mine[LANE_COLUMNS];
        lane_logits(logits, rows.columns, block, mine);
        u64 sum = 0;
#pragma unroll
        for (int i = 0; i < LANE_COLUMNS; i++) sum += integer_weight(mine[i], maximum);
        sum = warp_sum(sum);
        if (lane_number() == 0) before[block] = sum;
    }
    __syncthreads();
    if (warp_number() == 0) exclusive_scan(before, blocks);
    __syncthreads();
    u64* out = arguments.before + i64(row) * (blocks + 1);
    for (int block = threadIdx.x; block <= blocks; block += blockDim.x) out[block] = before[block];
}

// A uniform word of position: the lower or upper half of Philox4x32-10 of the counter (position, number / 2, stream).
__device__ __forceinline__ u64 random_word(u64 seed, u64 position, u32 number, u32 stream) {
    u32 c0 = u32(position), c1 = u32(position >> 32);
    u32 c2 = number / 2, c3 = stream;
    u32 k0 = u32(seed), k1 = u32(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const u32 high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        const u32 high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return number % 2 ? u64(c3) << 32 | c2 : u64(c1) << 32 | c0;
}

// Points in [0, total) of one row. Multinomial: floor(total x / 2^64) of a uniform word x each. Systematic, of one word:
// floor((k total + offset) / draws), k = 0 .. draws - 1; k total may take over 64 bits, so total is divided first.
struct Points {
    u64 seed, position, total, offset, quotient, remainder;
    u32 stream;
    u32 draws;

    __device__ __forceinline__ Points(const DrawArguments& arguments, int row)
        : seed(arguments.seed),
          position(arguments.positions[row]),
          total(u64(arguments.totals[row])),
          offset(0),
          quotient(0),
          remainder(0),
          stream(arguments.stream),
          draws(u32(arguments.draws)) {
        if (stream == SYSTEMATIC) {
            offset = __umul64hi(random_word(seed, position, 0, stream), total);
            quotient = total / draws;
            remainder = total % draws;
        }
    }

    __device__ __forceinline__ u64 point(u32 number) const {
        if (stream == SYSTEMATIC) return number * quotient + (number * remainder + offset) / draws;
        return __umul64hi(random_word(seed, position, number, stream), total);
    }
};

// The column whose stretch of this rank's weights holds the point; by one warp. Weights laid end to end divide
// [0, own), and a uniform point falls into a column's stretch in proportion to its weight (inverse-CDF sampling). First
// the block of columns, by bisection of the sums before blocks; then the lane whose columns reach beyond the point; then
// the column.
template <class T>
__device__ __forceinline__ int column_of(u64 point, const T* logits, const Rows& rows, float maximum,
                                         const u64* before) {
    int block = 0;
    for (int end = num_blocks(rows); end - block > 1;) {
        const int middle = (block + end) / 2;
        if (before[middle] <= point) {
            block = middle;
        } else {
            end = middle;
        }
    }
    point -= before[block];
    float mine[LANE_COLUMNS];
    lane_logits(logits, rows.columns, block, mine);
    u64 weights[LANE_COLUMNS], sum = 0;
#pragma unroll
    for (int i = 0; i < LANE_COLUMNS; i++) {
        weights[i] = integer_weight(mine[i], maximum);
        sum += weights[i];
    }
    const u64 through = warp_inclusive_sum(sum);
    const int holder = __ffs(__ballot_sync(ALL_LANES, through > point)) - 1;
    u64 reached = through - sum;
    int passed = 0;
#pragma unroll
    for (int i = 0; i < LANE_COLUMNS; i++) {
        reached += weights[i];
        passed += reached <= point;
    }
    return block * BLOCK_COLUMNS + holder * LANE_COLUMNS + __shfl_sync(ALL_LANES, passed, holder);
}

// Ascending, in place; count is a power of two. A bitonic network: which pairs are compared does not depend on the
// values, so that the barrier is all that threads have to agree on.
__device__ __forceinline__ void bitonic_sort(i32* values, int count) {
    for (int run = 2; run <= count; run *= 2) {
        for (int distance = run / 2; distance > 0; distance /= 2) {
            for (int pair = threadIdx.x; pair < count / 2; pair += blockDim.x) {
                const int first = 2 * pair - (pair & (distance - 1));
                const int a = values[first], b = values[first + distance];
                const bool ascending = (first & run) == 0;
                if ((a > b) == ascending) {
                    values[first] = b;
                    values[first + distance] = a;
                }
            }
            __syncthreads();
        }
    }
}

// One after the last of `count` ascending values, from `first`, that equal values[first].
__device__ __forceinline__ int end_of_run(const i32* values, int first, int count) {
    int last = first;
    for (int end = count; end - last > 1;) {
        const int middle = (last + end) / 2;
        if (values[middle] == values[first]) {
            last = middle;
        } else {
            end = middle;
        }
    }
    return last + 1;
}

// Distinct values but NO_COLUMN, and how often each occurs; returns how many; by one warp. Equal values lie together.
__device__ __forceinline__ int run_lengths(const i32* values, int count, i32* distinct, i32* counts) {
    int written = 0;
    for (int base = 0; base < count; base += 32) {
        const int index = base + lane_number();
        const bool starts = index < count && values[index] != NO_COLUMN &&
                            (index == 0 || values[index - 1] != values[index]);
        const unsigned starting = __ballot_sync(ALL_LANES, starts);
        if (starts) {
            const int place = written + __popc(starting & ((1u << lane_number()) - 1));
            distinct[place] = values[index];
            counts[place] = end_of_run(values, index, count) - index;
        }
        written += __popc(starting);
    }
    return written;
}

template <class T>
__global__ void __launch_bounds__(256) draw(DrawArguments arguments) {
    SHARED_MEMORY(shared);
    i32* drawn = reinterpret_cast<i32*>(shared);
    const Rows& rows = arguments.rows;
    const int row = blockIdx.x, draws = arguments.draws, blocks = num_blocks(rows);
    const T* logits = row_start<T>(rows, row);
    const float maximum = rows.maxima[row];
    const u64* before = arguments.before + i64(row) * (blocks + 1);
    const u64 below = u64(arguments.below[row]), own = before[blocks];
    const Points points(arguments, row);
    for (int number = warp_number(); number < arguments.slots; number += num_warps()) {
        int column = NO_COLUMN;
        // A point below this rank's stretch wraps round to one far above it.
        const u64 point = number < draws ? points.point(number) - below : own;
        if (point < own) column = column_of(point, logits, rows, maximum, before);
        if (lane_number() == 0) drawn[number] = column;
    }
    __syncthreads();
    // Systematic points ascend, and with them their columns.
    if (arguments.stream != SYSTEMATIC) bitonic_sort(drawn, arguments.slots);
    if (warp_number() > 0) return;
    const i64 start = i64(row) * draws;
    const int length = run_lengths(drawn, draws, arguments.columns + start, arguments.counts + start);
    if (lane_number() == 0) arguments.lengths[row] = length;
}

// How many logits exceed the threshold (upper half), and equal it (lower half): one scan of 64-bit sums counts both, as
// neither count reaches 2^32. All that exceed it are among the k largest; of equal ones the first, until there are k.
struct Rank {
    float threshold;
    __device__ __forceinline__ bool above(float logit) const { return logit > threshold; }
    __device__ __forceinline__ bool ties(float logit) const {
        return logit == threshold && logit > -infinity();
    }
    __device__ __forceinline__ u64 of(float logit) const {
        return above(logit) ? u64(1) << 32 : ties(logit) ? 1 : 0;
    }
    __device__ __forceinline__ u64 of(const float (&logits)[LANE_COLUMNS]) const {
        u64 sum = 0;
#pragma unroll
        for (int i = 0; i < LANE_COLUMNS; i++) sum += of(logits[i]);
        return sum;
    }
};

template <class T>
__global__ void __launch_bounds__(256) select(SelectArguments arguments) {
    SHARED_MEMORY(shared);
    u64* before = reinterpret_cast<u64*>(shared);
    const Rows& rows = arguments.rows;
    const int row = blockIdx.x, blocks = num_blocks(rows);
    const T* logits = row_start<T>(rows, row);
    const Rank rank{arguments.thresholds[row]};
    float mine[LANE_COLUMNS];
    for (int block = warp_number(); block < blocks; block += num_warps()) {
        lane_logits(logits, rows.columns, block, mine);
        const u64 sum = warp_sum(rank.of(mine));
        if (lane_number() == 0) before[block] = sum;
    }
    __syncthreads();
    if (warp_number() == 0) exclusive_scan(before, blocks);
    __syncthreads();
    const int above = int(before[blocks] >> 32), ties = int(before[blocks]);
    const int room = arguments.k - above;
    for (int block = warp_number(); block < blocks; block += num_warps()) {
        if (before[block + 1] == before[block]) continue;
        lane_logits(logits, rows.columns, block, mine);
        const u64 own = rank.of(mine);
        u64 passed = before[block] + warp_inclusive_sum(own) - own;
#pragma unroll
        for (int i = 0; i < LANE_COLUMNS; i++) {
            const int passed_ties = int(passed & 0xffffffffu);
            if (rank.above(mine[i]) || (rank.ties(mine[i]) && passed_ties < room)) {
                const i64 place = i64(row) * arguments.k + (passed >> 32) +
                                      (passed_ties < room ? passed_ties : room);
                arguments.columns[place] =
                    block * BLOCK_COLUMNS + lane_number() * LANE_COLUMNS + i;
                arguments.values[place] = mine[i];
                arguments.weights[place] =
                    i64(integer_weight(mine[i], rows.maxima[row]));
            }
            passed += rank.of(mine[i]);
        }
    }
    if (threadIdx.x == 0) arguments.lengths[row] = above + (ties < room ? ties : room);
}

// What is known of some columns of a row: the sum of weight * (maximum - logit), from which the host makes the entropy,
// log(W / 2^40) + depth / W; and the likeliest column. In fp64: the terms differ by 40 binary orders.
struct Look {
    double depth;
    float largest;
    int column;

    __device__ __forceinline__ void add(double other_depth, float other, int other_column) {
        depth += other_depth;
        if (other > largest || (other == largest && other_column < column)) {
            largest = other;
            column = other_column;
        }
    }
};

template <class T>
__global__ void __launch_bounds__(256) look(LookArguments arguments) {
    SHARED_MEMORY(shared);
    Look* of_warps = reinterpret_cast<Look*>(shared);
    const Rows& rows = arguments.rows;
    const int row = blockIdx.x;
    const T* logits = row_start<T>(rows, row);
    const float maximum = rows.maxima[row];
    Look mine{0.0, -infinity(), NO_COLUMN};
    for (int column = threadIdx.x; column < rows.columns; column += blockDim.x) {
        const float logit = Format<T>::value(logits[column]);
        const u64 weight = integer_weight(logit, maximum);
        const float depth = weight > 0 ? __fsub_rn(maximum, logit) : 0.0f;
        mine.add(static_cast<double>(weight) * static_cast<double>(depth), logit, column);
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance >>= 1) {
        const double depth = __shfl_xor_sync(ALL_LANES, mine.depth, distance);
        const float largest = __shfl_xor_sync(ALL_LANES, mine.largest, distance);
        mine.add(depth, largest, __shfl_xor_sync(ALL_LANES, mine.column, distance));
    }
    if (lane_number() == 0) of_warps[warp_number()] = mine;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int warp = 1; warp < num_warps(); warp++) {
        mine.add(of_warps[warp].depth, of_warps[warp].largest, of_warps[warp].column);
    }
    arguments.depths[row] = mine.depth;
    arguments.top[row] = mine.column;
}

}  // namespace teacher_sampling
