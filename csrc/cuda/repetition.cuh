// Device side of repetition: one row a block, all n-gram sizes and windows of the call.
//
// Ids. The id of an n-gram is the position of one of its occurrences, the same for all. The (n+1)-gram at t is then the
// pair (id at t, id at t + 1), so every level compares exact keys of two words, whatever n is.
//
// Finding ids. Every position writes itself into the slot of its key's hash, and one of them stays, whichever. Behind a
// barrier each looks who stayed: where it has the same key, it is the id. Otherwise another key took the slot, from all
// occurrences alike, and they try again under another hash, until none is left.
//
// Why any order of the writes gives the same result. In a round all occurrences of a key that are left write to one
// slot, and read it behind the barrier, when nobody writes: they all see the same position, and it is one that wrote
// there in this round. If it has their key, it is one of them, and the id of all. If not, none of them gets it. So
// positions get the same id exactly if they have the same key, and exactly one of them is its own id. Results count
// positions that are not, and compare ids for equality: which one stayed is in neither. Each round ends with a key less
// for each slot that was written. Nobody reads a slot that nobody wrote in the same round: the table is never cleared.
// The writes are atomic exchanges, since plain ones at once to one place would be a race.
//
// An (n+1)-gram can repeat only where both of its n-grams do: each level looks up only the positions that the level
// below left over, gathered into a list first, so that all lanes of a warp have one.
//
// Windows need the distance to the last occurrence of a token: one warp goes over the ids in order, 32 at a time. Which
// of 32 are the same takes longest to find, and where there are more warps, all of them do so before.
#pragma once

#include "cuda/device.cuh"

namespace daemon_fast::cuda {

constexpr int kMaxColumns = 32;  // n-gram sizes, and windows, of one call: kernel arguments
constexpr int kWindows = 3;      // counted in one pass over the ids: as many as there are by default
constexpr int64_t kMaxRepetitionTokens = int64_t{1} << 29;
constexpr int64_t kMaxSharedTokens = int64_t{1} << 15;  // with 16-bit positions and slots

// Threads of a block. One warp needs no barriers, and rows fill a GPU if they are many and short: a multiprocessor's
// shared memory holds 32 of 256 tokens, its most of blocks, and 17 of 512.
constexpr int kOneWarp = kWarp;
constexpr int kManyWarps = 256;
constexpr int64_t kOneWarpTokens = 512;
constexpr int64_t kOneWarpRows = 4;  // times the multiprocessors

struct RepetitionPlan {
    int ngram_count, window_count;
    int32_t ngrams[kMaxColumns], windows[kMaxColumns];  // cut to T + 1 and T, which changes no result
    int32_t longest_ngram;
};

// Of the table's slots. Short rows get more, of which fewer are taken, since a further round costs them most; but one
// warp gets few, so that more rows fit into a multiprocessor.
inline int table_bits(int64_t T, int threads) {
    const int64_t slots = T <= kOneWarpTokens && threads > kOneWarp ? 4 * T : 2 * T;
    int bits = 5;
    while (int64_t{1} << bits < slots) ++bits;
    return bits;
}

template <bool kShared>
using Position = std::conditional_t<kShared, uint16_t, uint32_t>;

// Where the parts of a row's working memory begin, in bytes: worked out once, by the host.
struct RowLayout {
    int bits;  // of the table's slots
    int64_t tokens, ids, next_ids, list, lost, repeated, next_repeated, counter, bytes;

    RowLayout(int64_t T, int threads, int64_t token_bytes, int64_t position_bytes) : bits(table_bits(T, threads)) {
        bytes = int64_t{4} << bits;
        const auto take = [&](int64_t size) {
            const int64_t here = bytes;
            bytes += align16(size);
            return here;
        };
        tokens = take(T * token_bytes);
        const int64_t whole = (T + kWarp - 1) / kWarp * kWarp;
        ids = take(whole * position_bytes);
        next_ids = take(whole * position_bytes);
        list = take(whole * position_bytes);
        lost = take(whole * position_bytes);
        repeated = take((T / 32 + 2) * 4);
        next_repeated = take((T / 32 + 2) * 4);
        counter = take(16);
    }
};

// Working memory of one row, in shared memory or, for rows too long for that, in global memory.
template <class Token, bool kShared>
struct RowScratch {
    using Index = Position<kShared>;

    uint32_t* table;                     // [2^bits] a position whose key's hash is the slot
    Token* tokens;                       // [T]
    Index *ids, *next_ids;               // [T, up to a multiple of 32] before an id is known, its slot
    Index *list, *lost;                  // [T] positions to look up; those to look up again. Or instead of both:
    uint32_t* same;                      // [T, up to a multiple of 32] which of its 32 positions have the same id
    uint32_t *repeated, *next_repeated;  // [T / 32 + 2] bit t: the n-gram at t occurs more than once
    uint32_t* counter;                   // [4]
    int bits;
    uint32_t round = 0;

    __device__ RowScratch(char* at, const RowLayout& layout)
        : table(reinterpret_cast<uint32_t*>(at)),
          tokens(reinterpret_cast<Token*>(at + layout.tokens)),
          ids(reinterpret_cast<Index*>(at + layout.ids)),
          next_ids(reinterpret_cast<Index*>(at + layout.next_ids)),
          list(reinterpret_cast<Index*>(at + layout.list)),
          lost(reinterpret_cast<Index*>(at + layout.lost)),
          same(reinterpret_cast<uint32_t*>(at + layout.list)),
          repeated(reinterpret_cast<uint32_t*>(at + layout.repeated)),
          next_repeated(reinterpret_cast<uint32_t*>(at + layout.next_repeated)),
          counter(reinterpret_cast<uint32_t*>(at + layout.counter)),
          bits(layout.bits) {}

    static RowLayout layout(int64_t T, int threads) { return RowLayout(T, threads, sizeof(Token), sizeof(Index)); }

    // Writes position t into the slot of its key's hash, and the slot into ids[t].
    __device__ __forceinline__ void enter(Index* to, uint32_t t, uint32_t key) {
        key *= 0x9e3779b1u;
        key ^= key >> 15;
        const uint32_t slot = key * (0x85ebca6bu + round * 0x2c1b3c6eu) >> (32 - bits);
        to[t] = static_cast<Index>(slot);
        atomicExch(&table[slot], t);
    }
};

template <int kThreads>
__device__ __forceinline__ void synchronize() {
    kThreads == kWarp ? __syncwarp() : __syncthreads();
}

template <int kThreads>
__device__ __forceinline__ void fill(void* at, int words, uint32_t value) {
    uint4* const wide = reinterpret_cast<uint4*>(at);
#pragma unroll 4
    for (int i = threadIdx.x; i < (words + 3) / 4; i += kThreads) wide[i] = make_uint4(value, value, value, value);
}

template <int kThreads>
__device__ __forceinline__ void clear(uint32_t* bits, int words) {
#pragma unroll 1
    for (int i = threadIdx.x; i < words; i += kThreads) bits[i] = 0;
}

__device__ __forceinline__ void mark(uint32_t* bits, uint32_t t) {
    atomicOr(&bits[t / 32], 1u << t % 32);
}

// The keys of the first level, and of the others.
template <class Token>
struct TokenKeys {
    const Token* tokens;
    __device__ static uint32_t fold(Token token) {
        return static_cast<uint32_t>(token) ^ static_cast<uint32_t>(static_cast<int64_t>(token) >> 32) * 0x27d4eb2fu;
    }
    __device__ uint32_t operator()(uint32_t t) const { return fold(tokens[t]); }
    __device__ bool same(uint32_t s, uint32_t t) const { return tokens[s] == tokens[t]; }
};

template <class Index>
struct PairKeys {
    const Index* ids;
    __device__ uint32_t operator()(uint32_t t) const {
        return ids[t] * (sizeof(Index) == 2 ? 0x10000u : 0x9e3779b1u) + ids[t + 1];
    }
    __device__ bool same(uint32_t s, uint32_t t) const {
        const uint32_t first = ids[s], second = ids[s + 1];
        return first == ids[t] && second == ids[t + 1];
    }
};

// The keys at the `count` positions of s.list, for the round at hand.
template <int kThreads, class Scratch, class Keys>
__device__ __forceinline__ void enter_listed(
    Scratch& s, const Keys& keys, uint32_t count, typename Scratch::Index* ids) {
    for (uint32_t i = threadIdx.x; i < count; i += kThreads) s.enter(ids, s.list[i], keys(s.list[i]));
    synchronize<kThreads>();
}

// Gives the keys at `count` positions, which have been entered, their ids: those of s.list, or the first ones if kAll.
// Marks those that occur more than once; returns how many of a thread's have another position as their id. Counter 0
// is 0 at first; s.list is overwritten.
template <int kThreads, bool kAll, class Scratch, class Keys>
__device__ __forceinline__ uint32_t
settle(Scratch& s, const Keys& keys, uint32_t count, typename Scratch::Index* ids, uint32_t* repeated) {
    using Index = typename Scratch::Index;
    uint32_t repeats = 0, parity = 0;
    const auto look = [&](auto all) {               // who stayed; who did not is listed
        constexpr uint32_t kChunk = 32 * kThreads;  // a thread keeps in a word which of its own lost
        for (uint32_t begin = threadIdx.x; begin < count; begin += kChunk) {
            const auto position = [&](uint32_t i) -> uint32_t { return all.value ? i : s.list[i]; };
            uint32_t lost = 0, bit = 1;
            for (uint32_t i = begin; i < count && bit; i += kThreads, bit <<= 1) {
                const uint32_t t = position(i), id = s.table[ids[t]];
                if (!keys.same(id, t)) {
                    lost |= bit;
                    continue;
                }
                ids[t] = static_cast<Index>(id);
                if (id == t) continue;
                mark(repeated, t);
                mark(repeated, id);
                ++repeats;
            }
            if (lost == 0) continue;
            uint32_t place = atomicAdd(&s.counter[parity], static_cast<uint32_t>(__popc(lost)));
            for (; lost; lost &= lost - 1)
                s.lost[place++] = static_cast<Index>(position(begin + lowest_bit(lost) * kThreads));
        }
        synchronize<kThreads>();
        count = s.counter[parity];
        Index* const list = s.list;
        s.list = s.lost;
        s.lost = list;
        parity ^= 1;
    };
    look(std::integral_constant<bool, kAll>());
    while (count) {
        ++s.round;
        if (threadIdx.x == 0) s.counter[parity] = 0;
        enter_listed<kThreads>(s, keys, count, ids);
        look(std::false_type());
    }
    return repeats;
}

// The block's sum of what its threads counted. Counter 3 is 0 at first.
template <int kThreads, class Scratch>
__device__ __forceinline__ uint32_t add_up(Scratch& s, uint32_t value) {
    value = __reduce_add_sync(kAllLanes, value);
    if (kThreads == kWarp) {
        __syncwarp();  // all have read the counters, which are written next: adding up orders no memory
        return value;
    }
    if (threadIdx.x % kWarp == 0 && value) atomicAdd(&s.counter[3], value);
    synchronize<kThreads>();
    return s.counter[3];
}

// Lists, in any order, the positions t < count whose n-grams at t and t + 1 both repeat; returns how many.
template <int kThreads, class Scratch>
__device__ __forceinline__ uint32_t list_candidates(Scratch& s, int count) {
    if (threadIdx.x == 0) s.counter[0] = s.counter[2] = 0;
    synchronize<kThreads>();
    if (threadIdx.x == 0) s.counter[3] = 0;                                    // all have read it
    for (int first = threadIdx.x * 8; first < count; first += kThreads * 8) {  // a thread takes 8 positions
        const uint32_t low = s.repeated[first / 32], high = s.repeated[first / 32 + 1];
        uint32_t bits = (low & (low >> 1 | high << 31)) >> first % 32 & 0xff;
        if (count - first < 8) bits &= (1u << (count - first)) - 1;
        if (bits == 0) continue;
        uint32_t place = atomicAdd(&s.counter[2], static_cast<uint32_t>(__popc(bits)));
        for (; bits; bits &= bits - 1) s.list[place++] = static_cast<typename Scratch::Index>(first + lowest_bit(bits));
    }
    synchronize<kThreads>();
    return s.counter[2];
}

// From n-grams to (n+1)-grams at the listed positions; returns how many have another position as their id.
template <int kThreads, class Scratch>
__device__ __forceinline__ uint32_t find_pairs(Scratch& s, uint32_t listed, int length) {
    using Index = typename Scratch::Index;
    const PairKeys<Index> keys{s.ids};
    clear<kThreads>(s.next_repeated, length / 32 + 2);
    ++s.round;
    enter_listed<kThreads>(s, keys, listed, s.next_ids);
    const uint32_t repeats = settle<kThreads, false>(s, keys, listed, s.next_ids, s.next_repeated);
    Index* const ids = s.ids;
    s.ids = s.next_ids;
    s.next_ids = ids;
    uint32_t* const repeated = s.repeated;
    s.repeated = s.next_repeated;
    s.next_repeated = repeated;
    return add_up<kThreads>(s, repeats);
}

// part / whole, or 1 - (whole - part) / whole, as the CPU rounds it: in float64, and then to float32. Up to 2^12, part
// / whole is at least 2^-48 from any tie of that last rounding, so that float32 gives the same at a tenth of the cost.
template <bool kComplement>
__device__ __forceinline__ float fraction(uint32_t part, uint32_t whole) {
    if (whole <= 4096) return static_cast<float>(part) / static_cast<float>(whole);
    const double of = static_cast<double>(whole);
    return static_cast<float>(
        kComplement ? 1.0 - static_cast<double>(whole - part) / of : static_cast<double>(part) / of);
}

// For count_windows: the ids up to a multiple of 32, and by all warps if there are several, which are the same.
template <int kThreads, class Scratch>
__device__ __forceinline__ void find_same(Scratch& s, int length) {
    using Index = typename Scratch::Index;
    const int whole = (length + kWarp - 1) / kWarp * kWarp;
    for (int t = (kThreads == kWarp ? whole - kWarp : 0) + static_cast<int>(threadIdx.x); t < whole; t += kThreads) {
        if (t >= length) s.ids[t] = static_cast<Index>(t);  // behind the row, each its own
        if (kThreads > kWarp) s.same[t] = __match_any_sync(kAllLanes, static_cast<uint32_t>(s.ids[t]));
    }
    if (kThreads > kWarp) synchronize<kThreads>();
}

// By the first warp, from the ids of the tokens; overwrites next_ids, which holds the last position of each id so far.
template <int kThreads, class Scratch>
__device__ __forceinline__ void count_windows(Scratch& s, const RepetitionPlan& plan, int length, float* out) {
    using Index = typename Scratch::Index;
    constexpr uint32_t kNone = sizeof(Index) == 2 ? 0xffffffffu : 0x7fffffffu;  // farther away than any window is wide
    const int lane = threadIdx.x, whole = (length + kWarp - 1) / kWarp * kWarp;
    const uint32_t below = (1u << lane) - 1, above = ~below << 1;
    Index* const last = s.next_ids;
    for (int first = 0; first < plan.window_count; first += kWindows) {
        uint32_t windows[kWindows], hits[kWindows] = {};
#pragma unroll
        for (int i = 0; i < kWindows; ++i)
            windows[i] = first + i < plan.window_count ? static_cast<uint32_t>(plan.windows[first + i]) : 0;
        fill<kWarp>(last, whole * static_cast<int>(sizeof(Index)) / 4, kNone);
        __syncwarp();
        for (int begin = 0; begin < whole; begin += kWarp) {
            const uint32_t id = s.ids[begin + lane];
            const uint32_t same = kThreads == kWarp ? __match_any_sync(kAllLanes, id) : s.same[begin + lane];
            const uint32_t before = same & below;
            const uint32_t earlier = last[id], previous = before ? begin + 31 - __clz(before) : earlier;
            const uint32_t distance = begin + lane - previous;
            __syncwarp();                                                          // all have read
            if ((same & above) == 0) last[id] = static_cast<Index>(begin + lane);  // the highest lane with this id
            __syncwarp();                                                          // before the next 32 read
#pragma unroll
            for (int i = 0; i < kWindows; ++i) hits[i] += distance <= windows[i];
        }
#pragma unroll
        for (int i = 0; i < kWindows; ++i) {
            hits[i] = __reduce_add_sync(kAllLanes, hits[i]);
            if (lane == 0 && first + i < plan.window_count)
                out[first + i] = length > 0 ? fraction<false>(hits[i], length) : 0.0f;
        }
    }
}

// out[ngram_count + window_count] of one row, by the whole block.
template <int kThreads, class Token, class Scratch>
__device__ __forceinline__ void repetition_row(
    const Token* row, int length, Scratch s, const RepetitionPlan& plan, float* out) {
    constexpr int kLoads = kThreads == kWarp ? 8 : 2;  // in flight
    Token tokens[kLoads];
    const auto load = [&](int begin) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
            if (i * kThreads < length - begin) tokens[i] = row[begin + i * kThreads];
    };
    load(threadIdx.x);
    clear<kThreads>(s.repeated, length / 32 + 2);
    if (threadIdx.x == 0) s.counter[0] = s.counter[3] = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < plan.ngram_count; i += kThreads) out[i] = 0.0f;
    for (int begin = threadIdx.x;;) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const int t = begin + i * kThreads;
            if (i * kThreads >= length - begin) break;
            s.tokens[t] = tokens[i];
            s.enter(s.ids, t, TokenKeys<Token>::fold(tokens[i]));
        }
        begin += kLoads * kThreads;
        if (begin >= length) break;
        load(begin);
    }
    synchronize<kThreads>();
    const uint32_t own = settle<kThreads, true>(s, TokenKeys<Token>{s.tokens}, length, s.ids, s.repeated);
    uint32_t repeats = add_up<kThreads>(s, own);
    find_same<kThreads>(s, length);
    if (threadIdx.x < kWarp) count_windows<kThreads>(s, plan, length, out + plan.ngram_count);
    for (int n = 1; n <= plan.longest_ngram && n <= length; ++n) {
        const int count = length - n + 1;
        if (n > 1) {
            const uint32_t listed = list_candidates<kThreads>(s, count);
            repeats = listed < 2 ? 0 : find_pairs<kThreads>(s, listed, length);
        }
        if (repeats == 0) break;  // and so does no longer n-gram: their columns stay 0
#pragma unroll 1
        for (int i = threadIdx.x; i < plan.ngram_count; i += kThreads)
            if (plan.ngrams[i] == n) out[i] = fraction<true>(repeats, count);
    }
    synchronize<kThreads>();  // the next row of this block overwrites the scratch
}

// Rows r = blockIdx.x, blockIdx.x + gridDim.x, ...: a grid of one block a row when the scratch is in shared memory.
// `lengths` is int64 or int32. A length outside [0, T] can't be reported without a synchronisation: the row becomes
// NaN. kShared is a constant so that the compiler knows the address space of every access.
template <class Token, int kThreads, bool kShared>
__global__ void __launch_bounds__(kThreads, kThreads == kWarp ? 32 : 3) repetition_kernel(
    const Token* tokens, int64_t row_stride, const void* lengths, bool wide_lengths, int64_t length_stride, int64_t R,
    int64_t T, RepetitionPlan plan, RowLayout layout, char* global_scratch, float* out) {
    using Scratch = RowScratch<Token, kShared>;
    char* const scratch = kShared ? dynamic_shared() : global_scratch + blockIdx.x * layout.bytes;
    const int columns = plan.ngram_count + plan.window_count;
    for (int64_t r = blockIdx.x; r < R; r += gridDim.x) {
        const int64_t length = wide_lengths ? static_cast<const int64_t*>(lengths)[r * length_stride]
                                            : static_cast<const int32_t*>(lengths)[r * length_stride];
        float* const row_out = out + r * columns;
        if (length < 0 || length > T) {
#pragma unroll 1
            for (int i = threadIdx.x; i < columns; i += kThreads) row_out[i] = nan_float();
            continue;
        }
        repetition_row<kThreads>(
            tokens + r * row_stride, static_cast<int>(length), Scratch(scratch, layout), plan, row_out);
    }
}

}  // namespace daemon_fast::cuda
