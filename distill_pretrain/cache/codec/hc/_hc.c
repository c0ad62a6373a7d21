/* Coder of blocks of targets: the payload of codecs 3 and 4 of FORMAT.md. Plain functions for ctypes, no Python API.
 *
 * The caller passes validated tables (hc_tables.py); payload bytes may be anything: nothing outside payload[0, size)
 * is read and nothing outside the outputs is written.
 *
 * Contexts: 0 entries of a position; GAPS + 5 p + l gap classes; VALUES + 5 a + l counts, or VALUES + l
 * log-probabilities. A row of `codes` and `lengths` has SYMBOLS columns, a row of `lookup` 2^CODE_BITS of
 * symbol << 4 | length. */

#include <stdint.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "little-endian machines only; the package works without this file, slowly"
#endif

#define ABI 2
#define CODE_BITS 8
#define SYMBOLS 81
#define BUCKETS 5
#define GAPS 1
#define VALUES (GAPS + 22 * BUCKETS)
#define MOST_ENTRIES 1024

/* The streams' states stay in registers only where these are inlined. */
#define INLINE __attribute__((always_inline)) static inline

/* What decode returns; hc_native.py has the sentences. */
enum { SOUND, TOO_MANY_ENTRIES, RANK_TOO_LARGE, COUNT_TOO_LARGE, WRONG_ENTRIES, WRONG_LENGTH, PADDING };

static const uint8_t LEFT_BUCKET[18] = {0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 4};
static const uint8_t EXCESS_BUCKET[33] = {0, 1, 2, 2, 3, 3, 3, 4, 4, 4, 4, 4, 5, 5, 5, 5, 5,
                                          5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 7};

INLINE uint32_t left_bucket(uint32_t left) { return LEFT_BUCKET[left < 17 ? left : 17]; }
INLINE uint32_t excess_bucket(uint32_t excess) { return EXCESS_BUCKET[excess < 32 ? excess : 32]; }
INLINE uint32_t bit_length(uint32_t value) { return value ? 32 - __builtin_clz(value) : 0; }
INLINE uint64_t low_bits(uint64_t word, uint32_t count) { return word & ((UINT64_C(1) << count) - 1); }

int32_t hc_abi(void) { return ABI; }

/* 57 bits or more from bit position `at`; zeros beyond the end. */
INLINE uint64_t peek(const uint8_t *payload, uint64_t size, uint64_t at) {
    uint64_t byte = at >> 3, word = 0;
    if (__builtin_expect(byte + 8 <= size, 1))
        memcpy(&word, payload + byte, 8);
    else if (byte < size)
        memcpy(&word, payload + byte, size - byte);
    return word >> (at & 7);
}

/* Value of a symbol of sizes; *used grows by the raw bits taken from `word`. */
INLINE uint32_t size_of_symbol(uint32_t symbol, uint64_t word, uint32_t *used) {
    if (__builtin_expect(symbol < 64, 1)) return symbol;
    uint32_t raw = 4 + ((symbol - 64) >> 2);
    *used += raw;
    return ((4 + (symbol & 3)) << raw) | (uint32_t)low_bits(word, raw);
}

/* One of a block's two streams. Two are decoded in turn, since what bounds the speed of one is the wait for the place
 * of its next code. */
typedef struct {
    const uint8_t *payload;
    uint64_t size, at; /* bytes; the next bit */
    int64_t token, last_token, entry, last_entry;
    uint32_t left, rank, rank_class; /* of the row under way */
    int32_t excess;
} Stream;

typedef struct {
    uint32_t num_draws, vocab_size, most;
    const uint16_t *lookup;
    const int32_t *ids_by_rank;
    int32_t *entries_per_token, *ids, *values;
} Block;

/* Goes on to the next row that has entries; left = 0 at the end of the stream. */
INLINE int next_row(const Block *block, Stream *stream) {
    const uint32_t mask = (1u << CODE_BITS) - 1;
    stream->left = 0;
    while (stream->left == 0 && stream->token < stream->last_token) {
        uint64_t word = peek(stream->payload, stream->size, stream->at);
        uint32_t found = block->lookup[word & mask], used = found & 15;
        uint32_t entries = size_of_symbol(found >> 4, word >> used, &used);
        stream->at += used;
        if (entries > block->most) return TOO_MANY_ENTRIES;
        if (entries > stream->last_entry - stream->entry) return WRONG_ENTRIES;
        block->entries_per_token[stream->token++] = (int32_t)entries;
        stream->left = entries;
        stream->excess = (int32_t)(block->num_draws - entries);
        stream->rank = stream->rank_class = 0;
    }
    return SOUND;
}

/* Decodes one entry of a stream with left > 0. */
INLINE int next_entry(int counts, const Block *block, Stream *stream) {
    const uint32_t mask = (1u << CODE_BITS) - 1;
    const uint16_t *gap_lookup = block->lookup + ((size_t)GAPS << CODE_BITS);
    const uint16_t *value_lookup = block->lookup + ((size_t)VALUES << CODE_BITS);
    uint32_t bucket = left_bucket(stream->left);
    uint64_t word = peek(stream->payload, stream->size, stream->at);
    uint32_t found = gap_lookup[((stream->rank_class * BUCKETS + bucket) << CODE_BITS) + (word & mask)];
    uint32_t gap_class = found >> 4, used = found & 15;
    word >>= used;
    stream->rank += (1u << gap_class) | (uint32_t)low_bits(word, gap_class);
    word >>= gap_class;
    used += gap_class;
    if (stream->rank > block->vocab_size) return RANK_TOO_LARGE;
    stream->rank_class = 32 - __builtin_clz(stream->rank);
    block->ids[stream->entry] = block->ids_by_rank[stream->rank - 1];
    int32_t value;
    if (!counts) {
        found = value_lookup[(bucket << CODE_BITS) + (word & mask)];
        uint32_t value_class = found >> 4, raw = value_class ? value_class - 1 : 0, code = found & 15;
        value = value_class ? (int32_t)((1u << raw) | low_bits(word >> code, raw)) : 0;
        used += code + raw;
    } else {
        /* A last count has no bits: context and excess are read all the same, and dropped. */
        uint32_t context = excess_bucket((uint32_t)stream->excess) * BUCKETS + bucket, code;
        found = value_lookup[(context << CODE_BITS) + (word & mask)];
        code = found & 15;
        value = (int32_t)size_of_symbol(found >> 4, word >> code, &code);
        if (stream->left == 1) {
            value = stream->excess + 1;
            code = 0;
        }
        used += code;
        stream->excess -= value - 1;
        if (stream->excess < 0) return COUNT_TOO_LARGE;
    }
    stream->at += used;
    block->values[stream->entry++] = value;
    return --stream->left ? SOUND : next_row(block, stream);
}

INLINE int ending(const Stream *stream) {
    if (stream->entry != stream->last_entry) return WRONG_ENTRIES;
    if ((stream->at + 7) >> 3 != stream->size) return WRONG_LENGTH;
    if ((stream->at & 7) && stream->payload[stream->size - 1] >> (stream->at & 7)) return PADDING;
    return SOUND;
}

INLINE int decode(int counts, const Block *block, Stream first, Stream second) {
    int rule;
    if ((rule = next_row(block, &first)) || (rule = next_row(block, &second))) return rule;
    while (first.left && second.left) {
        if ((rule = next_entry(counts, block, &first)) || (rule = next_entry(counts, block, &second))) return rule;
    }
    while (first.left)
        if ((rule = next_entry(counts, block, &first))) return rule;
    while (second.left)
        if ((rule = next_entry(counts, block, &second))) return rule;
    rule = ending(&first);
    return rule ? rule : ending(&second);
}

static int decode_kind(int counts, const Block *block, const Stream *first, const Stream *second) {
    return counts ? decode(1, block, *first, *second) : decode(0, block, *first, *second);
}

#if defined(__x86_64__)
/* The same with the shifts of processors since 2013, a tenth faster. */
__attribute__((target("bmi,bmi2,lzcnt"))) static int decode_kind_bmi2(int counts, const Block *block, const Stream *first,
                                                                      const Stream *second) {
    return counts ? decode(1, block, *first, *second) : decode(0, block, *first, *second);
}
#endif

/* payload uint8[size] -> entries_per_token int32[num_tokens], ids and values int32[num_entries]; returns the enum.
 * lookup: uint16[contexts][2^CODE_BITS]; ids_by_rank: int32[vocab_size], rank 1 first. */
int32_t hc_decode(int32_t counts, const uint8_t *payload, int64_t size, int64_t num_tokens, int64_t num_entries,
                  int32_t num_draws, int32_t vocab_size, const uint16_t *lookup, const int32_t *ids_by_rank,
                  int32_t *entries_per_token, int32_t *ids, int32_t *values) {
    uint32_t most = (uint32_t)(num_draws < vocab_size ? num_draws : vocab_size), head[2];
    if (size < (int64_t)sizeof head) return WRONG_LENGTH;
    memcpy(head, payload, sizeof head);
    payload += sizeof head;
    size -= sizeof head;
    if (head[0] > size) return WRONG_LENGTH;
    if (head[1] > num_entries) return WRONG_ENTRIES;
    int64_t half = (num_tokens + 1) / 2;
    Block block = {(uint32_t)num_draws, (uint32_t)vocab_size, most, lookup, ids_by_rank, entries_per_token, ids, values};
    Stream first = {payload, head[0], 0, 0, half, 0, head[1], 0, 0, 0, 0};
    Stream second = {payload + head[0], (uint64_t)size - head[0], 0, half, num_tokens, head[1], num_entries, 0, 0, 0, 0};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt"))
        return decode_kind_bmi2(counts, &block, &first, &second);
#endif
    return decode_kind(counts, &block, &first, &second);
}

/* Bits not yet in the output: fewer than 8 between calls of flush. */
typedef struct {
    uint8_t *out, *end;
    uint64_t bits;
    uint32_t count;
} Writer;

static inline void put(Writer *writer, uint64_t bits, uint32_t count) {
    writer->bits |= bits << writer->count;
    writer->count += count;
}

static inline void put_symbol(Writer *writer, const uint16_t *codes, const uint8_t *lengths, uint32_t context,
                              uint32_t symbol) {
    put(writer, codes[context * SYMBOLS + symbol], lengths[context * SYMBOLS + symbol]);
}

static inline void put_size(Writer *writer, const uint16_t *codes, const uint8_t *lengths, uint32_t context,
                            uint32_t value) {
    if (value < 64) {
        put_symbol(writer, codes, lengths, context, value);
        return;
    }
    uint32_t octave = bit_length(value) - 1, raw = octave - 2;
    put_symbol(writer, codes, lengths, context, 64 + (octave - 6) * 4 + ((value >> raw) & 3));
    put(writer, low_bits(value, raw), raw);
}

static inline int flush(Writer *writer) {
    if (writer->end - writer->out < 8) return 0;
    memcpy(writer->out, &writer->bits, 8);
    writer->out += writer->count >> 3;
    writer->bits >>= writer->count & ~7u;
    writer->count &= 7;
    return 1;
}

/* Shell sort; keys are distinct but for a caller's bug. */
static void sort(uint64_t *keys, uint32_t count) {
    static const uint32_t gaps[8] = {701, 301, 132, 57, 23, 10, 4, 1};
    for (int g = 0; g < 8; g++) {
        uint32_t gap = gaps[g];
        if (gap > 1 && gap * 2 > count) continue;
        for (uint32_t i = gap; i < count; i++) {
            uint64_t key = keys[i];
            uint32_t j = i;
            for (; j >= gap && keys[j - gap] > key; j -= gap) keys[j] = keys[j - gap];
            keys[j] = key;
        }
    }
}

/* Rows of (ids, values), in any order within a row -> one stream; returns its bytes, -1 where `capacity` is too
 * small (8 bytes more than the stream suffice), -2 where an id comes twice. Row lengths are at most MOST_ENTRIES,
 * ids within the vocabulary, counts of a row add up to num_draws. rank_of: int32[V], from 1. */
static int64_t encode(int32_t counts, const int32_t *entries_per_token, const int32_t *ids, const int32_t *values,
                      int64_t num_tokens, int32_t num_draws, const int32_t *rank_of, const uint16_t *codes,
                      const uint8_t *lengths, uint8_t *out, int64_t capacity) {
    Writer writer = {out, out + capacity, 0, 0};
    uint64_t row[MOST_ENTRIES];
    for (int64_t token = 0; token < num_tokens; token++) {
        uint32_t entries = (uint32_t)entries_per_token[token], previous = 0;
        put_size(&writer, codes, lengths, 0, entries);
        if (!flush(&writer)) return -1;
        for (uint32_t i = 0; i < entries; i++)
            row[i] = (uint64_t)rank_of[ids[i]] << 32 | (uint32_t)values[i];
        ids += entries;
        values += entries;
        sort(row, entries);
        uint32_t excess = (uint32_t)num_draws - entries;
        for (uint32_t i = 0; i < entries; i++) {
            uint32_t left = entries - i, bucket = left_bucket(left);
            uint32_t rank = (uint32_t)(row[i] >> 32), value = (uint32_t)row[i], gap = rank - previous;
            if (gap == 0) return -2;
            uint32_t gap_class = bit_length(gap) - 1;
            put_symbol(&writer, codes, lengths, GAPS + bit_length(previous) * BUCKETS + bucket, gap_class);
            put(&writer, low_bits(gap, gap_class), gap_class);
            if (!counts) {
                uint32_t value_class = bit_length(value), raw = value_class ? value_class - 1 : 0;
                put_symbol(&writer, codes, lengths, VALUES + bucket, value_class);
                put(&writer, low_bits(value, raw), raw);
            } else if (left > 1) {
                put_size(&writer, codes, lengths, VALUES + excess_bucket(excess) * BUCKETS + bucket, value);
                excess -= value - 1;
            }
            if (!flush(&writer)) return -1;
            previous = rank;
        }
    }
    if (writer.count) *writer.out++ = (uint8_t)writer.bits;
    return writer.out - out;
}

/* As `encode`, the first half of the rows and the rest as the two streams of a payload. */
int64_t hc_encode(int32_t counts, const int32_t *entries_per_token, const int32_t *ids, const int32_t *values,
                  int64_t num_tokens, int32_t num_draws, const int32_t *rank_of, const uint16_t *codes,
                  const uint8_t *lengths, uint8_t *out, int64_t capacity) {
    int64_t half = (num_tokens + 1) / 2, entries = 0;
    uint32_t head[2];
    for (int64_t token = 0; token < half; token++) entries += entries_per_token[token];
    if (capacity < (int64_t)sizeof head) return -1;
    int64_t first = encode(counts, entries_per_token, ids, values, half, num_draws, rank_of, codes, lengths,
                           out + sizeof head, capacity - (int64_t)sizeof head);
    if (first < 0) return first;
    head[0] = (uint32_t)first;
    head[1] = (uint32_t)entries;
    memcpy(out, head, sizeof head);
    first += sizeof head;
    int64_t second = encode(counts, entries_per_token + half, ids + entries, values + entries, num_tokens - half,
                            num_draws, rank_of, codes, lengths, out + first, capacity - first);
    return second < 0 ? second : first + second;
}
