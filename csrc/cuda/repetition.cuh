// Device side of repetition: one row a block, all n-gram sizes and windows of the call.
//
// Ids. The id of an n-gram is the position of whichever of its occurrences won a slot of the hash table. The
// (n+1)-gram at t is then the pair (id at t, id at t + 1), so every level compares exact keys of two words, whatever
// n is. Which occurrence wins differs from run to run; how many ids there are does not.
//
// An (n+1)-gram can repeat only where both of its n-grams do: each level looks up only the positions that the level
// below left over, gathered into a list first, so that all lanes of a warp have one.
//
// Windows need the distance to the last occurrence of a token: one warp goes over the ids in order, 32 at a time.
#pragma once

#include "cuda/device.cuh"

namespace daemon_fast::cuda {

constexpr int kMaxColumns = 32;  // n-gram sizes, and windows, of one call: kernel arguments, and one lane a window
constexpr int kMaxRepetitionThreads = 256;
constexpr int64_t kSlotsPerKey = 2;
constexpr uint32_t kFree = 0;  // of a table's slot; else position + 1

struct RepetitionPlan {
    int ngram_count, window_count;
    int32_t ngrams[kMaxColumns], windows[kMaxColumns];  // cut to T + 1 and T, which changes no result
    int32_t longest_ngram;
};

__host__ __device__ inline uint32_t table_slots(int64_t keys) {
    uint32_t slots = 32;
    while (slots < kSlotsPerKey * keys) slots *= 2;
    return slots;
}

// A warp for 512 tokens: rows are many, and in one warp barriers cost next to nothing.
__host__ __device__ inline int repetition_threads(int64_t T) {
    int threads = kWarp;
    while (threads < kMaxRepetitionThreads && threads * 16 < T) threads *= 2;
    return threads;
}

// Working memory of one row, in shared memory or, for rows too long for that, in global memory.
template <class Token, class Index>
struct RowScratch {
    Token* tokens;                       // [T]
    uint32_t* table;                     // [slots]
    Index *ids, *next_ids;               // [T]
    Index* list;                         // [T] positions to look up at the level at hand
    uint32_t *repeated, *next_repeated;  // [T / 32 + 2] bit t: the n-gram at t occurs more than once
    uint32_t* counter;                   // [2] length of the list; repeats of the level at hand

    static __host__ __device__ int64_t bytes(int64_t T) {
        return align16(T * int64_t{sizeof(Token)}) + align16(int64_t{table_slots(T)} * 4) +
               3 * align16(T * int64_t{sizeof(Index)}) + 2 * align16((T / 32 + 2) * 4) + 16;
    }

    __device__ RowScratch(char* at, int64_t T) {
        const auto take = [&](int64_t size) {
            char* const here = at;
            at += align16(size);
            return here;
        };
        tokens = reinterpret_cast<Token*>(take(T * int64_t{sizeof(Token)}));
        table = reinterpret_cast<uint32_t*>(take(int64_t{table_slots(T)} * 4));
        ids = reinterpret_cast<Index*>(take(T * int64_t{sizeof(Index)}));
        next_ids = reinterpret_cast<Index*>(take(T * int64_t{sizeof(Index)}));
        list = reinterpret_cast<Index*>(take(T * int64_t{sizeof(Index)}));
        repeated = reinterpret_cast<uint32_t*>(take((T / 32 + 2) * 4));
        next_repeated = reinterpret_cast<uint32_t*>(take((T / 32 + 2) * 4));
        counter = reinterpret_cast<uint32_t*>(take(8));
    }
};

// Finds or makes the id of the key at position t; `equal(p)` tells whether position p holds the same key.
template <class Equal>
__device__ __forceinline__ uint32_t
find_or_insert(uint32_t* table, uint32_t mask, uint64_t key, uint32_t t, Equal equal) {
    uint32_t slot = static_cast<uint32_t>((key * 0x9E3779B97F4A7C15ull) >> 32) & mask;
    for (;; slot = (slot + 1) & mask) {
        const uint32_t seen = atomicCAS(&table[slot], kFree, t + 1);
        if (seen == kFree) return t;
        if (equal(seen - 1)) return seen - 1;
    }
}

__device__ __forceinline__ void clear_table(uint32_t* table, uint32_t slots) {
    uint4* const wide = reinterpret_cast<uint4*>(table);
    for (uint32_t i = threadIdx.x; i < slots / 4; i += blockDim.x) wide[i] = make_uint4(kFree, kFree, kFree, kFree);
}

__device__ __forceinline__ void mark(uint32_t* bits, uint32_t t) {
    atomicOr(&bits[t / 32], 1u << t % 32);
}

// Ids of all tokens, which of them repeat, and, in counter[1], how many have another position as their id. The tables,
// bits and counters must be clear.
template <class Token, class Index>
__device__ void find_tokens(RowScratch<Token, Index>& s, int length, uint32_t slots) {
    for (int begin = 0; begin < length; begin += blockDim.x) {
        const uint32_t t = begin + threadIdx.x;
        bool repeats = false;
        if (t < static_cast<uint32_t>(length)) {
            const Token token = s.tokens[t];
            const uint32_t id = find_or_insert(
                s.table, slots - 1, static_cast<uint64_t>(token), t, [&](uint32_t p) { return s.tokens[p] == token; });
            s.ids[t] = static_cast<Index>(id);
            repeats = id != t;
            if (repeats) mark(s.repeated, id);
        }
        const uint32_t bits = __ballot_sync(kAllLanes, repeats);
        if (threadIdx.x % kWarp == 0 && bits) {
            atomicOr(&s.repeated[t / 32], bits);
            atomicAdd(&s.counter[1], static_cast<uint32_t>(__popc(bits)));
        }
    }
    __syncthreads();
}

// Lists, in any order, the positions t < count whose n-grams at t and t + 1 both repeat; returns how many.
template <class Token, class Index>
__device__ uint32_t list_candidates(RowScratch<Token, Index>& s, int count) {
    if (threadIdx.x == 0) s.counter[0] = s.counter[1] = 0;
    __syncthreads();
    const int lane = threadIdx.x % kWarp, words = (count + 31) / 32;
    for (int word = threadIdx.x / kWarp; word < words; word += blockDim.x / kWarp) {
        uint32_t bits = s.repeated[word] & (s.repeated[word] >> 1 | s.repeated[word + 1] << 31);
        if (count - word * 32 < 32) bits &= (1u << (count - word * 32)) - 1;
        uint32_t begin = 0;
        if (lane == 0 && bits) begin = atomicAdd(&s.counter[0], static_cast<uint32_t>(__popc(bits)));
        begin = __shfl_sync(kAllLanes, begin, 0);
        if (bits >> lane & 1) s.list[begin + __popc(bits & ((1u << lane) - 1))] = static_cast<Index>(word * 32 + lane);
    }
    __syncthreads();
    return s.counter[0];
}

// From n-grams to (n+1)-grams at the listed positions; returns how many have another position as their id.
template <class Token, class Index>
__device__ uint32_t find_pairs(RowScratch<Token, Index>& s, uint32_t listed, int length) {
    const uint32_t slots = table_slots(listed);
    clear_table(s.table, slots);
    for (int word = threadIdx.x; word < length / 32 + 2; word += blockDim.x) s.next_repeated[word] = 0;
    __syncthreads();
    uint32_t repeats = 0;
    for (uint32_t i = threadIdx.x; i < listed; i += blockDim.x) {
        const uint32_t t = s.list[i];
        const Index first = s.ids[t], second = s.ids[t + 1];
        const uint64_t key = static_cast<uint64_t>(first) << 32 | second;
        const uint32_t id = find_or_insert(
            s.table, slots - 1, key, t, [&](uint32_t p) { return s.ids[p] == first && s.ids[p + 1] == second; });
        s.next_ids[t] = static_cast<Index>(id);
        if (id != t) {
            mark(s.next_repeated, t);
            mark(s.next_repeated, id);
            ++repeats;
        }
    }
    if (repeats) atomicAdd(&s.counter[1], repeats);
    __syncthreads();
    const uint32_t total = s.counter[1];
    Index* const ids = s.ids;
    s.ids = s.next_ids;
    s.next_ids = ids;
    uint32_t* const repeated = s.repeated;
    s.repeated = s.next_repeated;
    s.next_repeated = repeated;
    __syncthreads();  // before the counters are cleared
    return total;
}

// By the first warp, from the ids of the tokens; overwrites next_ids, which holds the last position of each id so far.
template <class Token, class Index>
__device__ void count_windows(RowScratch<Token, Index>& s, const RepetitionPlan& plan, int length, float* out) {
    constexpr Index kNone = static_cast<Index>(~Index{0});  // no position: T stays below
    const int lane = threadIdx.x;
    Index* const last = s.next_ids;
    for (int t = lane; t < length; t += kWarp) last[t] = kNone;
    __syncwarp();
    uint32_t hits = 0;  // of the window number `lane`
    for (int begin = 0; begin < length; begin += kWarp) {
        const int t = begin + lane;
        const bool inside = t < length;
        const uint32_t id = inside ? s.ids[t] : ~0u;
        const uint32_t same = __match_any_sync(kAllLanes, id), before = same & ((1u << lane) - 1);
        uint32_t distance = 0;  // 0: none
        if (before)
            distance = lane - (31 - __clz(before));
        else if (inside && last[id] != kNone)
            distance = t - last[id];
        __syncwarp();                                                       // all have read
        if (inside && same >> lane == 1) last[id] = static_cast<Index>(t);  // the highest lane of those with this id
        __syncwarp();                                                       // before the next 32 read
        for (int i = 0; i < plan.window_count; ++i) {
            const bool hit = inside && distance - 1 < static_cast<uint32_t>(plan.windows[i]);
            const uint32_t bits = __ballot_sync(kAllLanes, hit);
            if (lane == i) hits += __popc(bits);
        }
    }
    if (lane < plan.window_count) out[lane] = length > 0 ? static_cast<float>(double(hits) / double(length)) : 0.0f;
}

// out[ngram_count + window_count] of one row, by the whole block.
template <class Token, class Index>
__device__ void repetition_row(
    const Token* row, int length, RowScratch<Token, Index> s, const RepetitionPlan& plan, float* out) {
    const uint32_t slots = table_slots(length);
    for (int t = threadIdx.x; t < length; t += blockDim.x) s.tokens[t] = row[t];
    clear_table(s.table, slots);
    for (int word = threadIdx.x; word < length / 32 + 2; word += blockDim.x) s.repeated[word] = 0;
    if (threadIdx.x == 0) s.counter[1] = 0;
    for (int i = threadIdx.x; i < plan.ngram_count; i += blockDim.x) out[i] = 0.0f;
    __syncthreads();
    find_tokens(s, length, slots);
    if (plan.window_count && threadIdx.x < kWarp) count_windows(s, plan, length, out + plan.ngram_count);
    uint32_t repeats = s.counter[1];
    __syncthreads();  // before the counters are cleared, and next_ids used again
    for (int n = 1; n <= plan.longest_ngram && n <= length; ++n) {
        const int count = length - n + 1;
        if (n > 1) {
            const uint32_t listed = list_candidates(s, count);
            repeats = listed < 2 ? 0 : find_pairs(s, listed, length);
        }
        if (repeats == 0) break;  // and so does no longer n-gram: their columns stay 0
        for (int i = threadIdx.x; i < plan.ngram_count; i += blockDim.x)
            if (plan.ngrams[i] == n)
                out[i] = static_cast<float>(1.0 - double(count - static_cast<int>(repeats)) / double(count));
    }
    __syncthreads();  // the next row of this block overwrites the scratch
}

// Rows r = blockIdx.x, blockIdx.x + gridDim.x, ...: a grid of one block a row when the scratch is in shared memory.
// `lengths` is int64 or int32. A length outside [0, T] can't be reported without a synchronisation: the row becomes
// NaN. kShared is a constant so that the compiler knows the address space of every access.
template <class Token, class Index, bool kShared>
__global__ void __launch_bounds__(kMaxRepetitionThreads, 4) repetition_kernel(
    const Token* tokens, int64_t row_stride, const void* lengths, bool wide_lengths, int64_t length_stride, int64_t R,
    int64_t T, RepetitionPlan plan, char* global_scratch, float* out) {
    char* const scratch = kShared ? dynamic_shared() : global_scratch + blockIdx.x * RowScratch<Token, Index>::bytes(T);
    const int columns = plan.ngram_count + plan.window_count;
    for (int64_t r = blockIdx.x; r < R; r += gridDim.x) {
        const int64_t length = wide_lengths ? static_cast<const int64_t*>(lengths)[r * length_stride]
                                            : static_cast<const int32_t*>(lengths)[r * length_stride];
        float* const row_out = out + r * columns;
        if (length < 0 || length > T) {
            for (int i = threadIdx.x; i < columns; i += blockDim.x) row_out[i] = nan_float();
            continue;
        }
        repetition_row<Token, Index>(
            tokens + r * row_stride, static_cast<int>(length), RowScratch<Token, Index>(scratch, T), plan, row_out);
    }
}

}  // namespace daemon_fast::cuda
