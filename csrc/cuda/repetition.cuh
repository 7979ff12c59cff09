// Device side of repetition: one row a block, all n-gram sizes and windows of the call. No torch here, and nothing
// beyond barriers and atomics: the tests also compile this file with g++ and run its threads on the CPU.
//
// Ids. The id of an n-gram is the position of whichever of its occurrences won a slot of the hash table. The
// (n+1)-gram at t is then the pair (id at t, id at t + 1), so every level compares exact keys of two words, whatever
// n is. Which occurrence wins differs from run to run; how many ids there are does not.
#pragma once

#include <cstdint>

namespace daemon_fast::cuda {

constexpr int kMaxColumns = 32;  // n-gram sizes, and windows, of one call: they travel as kernel arguments

struct RepetitionPlan {
    int ngram_count, window_count;
    int32_t ngrams[kMaxColumns], windows[kMaxColumns];  // cut to T + 1 and T, which changes no result
    int32_t longest_ngram, widest_window;
};

// Working memory of one row, in shared memory or, for rows too long for that, in global memory.
template <class Token, class Index>
struct RowScratch {
    Token* tokens;      // [T]
    uint32_t* table;    // [slots] position + 1, or 0
    Index* ids;         // [T]
    Index* next_ids;    // [T]
    Index* distance;    // [T] to the last occurrence of the token, or 0
    uint32_t* counter;  // [2] repeats of the level at hand; hits of the window at hand

    static __host__ __device__ int64_t align(int64_t bytes) { return (bytes + 15) / 16 * 16; }

    static __host__ __device__ int64_t bytes(int64_t T, int64_t slots) {
        return align(T * int64_t{sizeof(Token)}) + align(slots * 4) + 3 * align(T * int64_t{sizeof(Index)}) + 16;
    }

    __device__ RowScratch(char* at, int64_t T, int64_t slots) {
        const auto take = [&](int64_t size) {
            char* const here = at;
            at += align(size);
            return here;
        };
        tokens = reinterpret_cast<Token*>(take(T * int64_t{sizeof(Token)}));
        table = reinterpret_cast<uint32_t*>(take(slots * 4));
        ids = reinterpret_cast<Index*>(take(T * int64_t{sizeof(Index)}));
        next_ids = reinterpret_cast<Index*>(take(T * int64_t{sizeof(Index)}));
        distance = reinterpret_cast<Index*>(take(T * int64_t{sizeof(Index)}));
        counter = reinterpret_cast<uint32_t*>(take(8));
    }
};

// Finds or makes the id of the key at position t; `equal(p)` tells whether position p holds the same key.
template <class Equal>
__device__ uint32_t find_or_insert(uint32_t* table, uint32_t mask, uint64_t key, uint32_t t, Equal equal) {
    uint32_t slot = static_cast<uint32_t>((key * 0x9E3779B97F4A7C15ull) >> 32) & mask;
    for (;; slot = (slot + 1) & mask) {
        const uint32_t seen = atomicCAS(&table[slot], 0u, t + 1);
        if (seen == 0) return t;
        if (equal(seen - 1)) return seen - 1;
    }
}

// Ids of all n-grams of the row, from those of the (n-1)-grams. Returns, to every thread, how many n-grams repeat one
// that has another position as its id.
template <class Token, class Index>
__device__ uint32_t level(RowScratch<Token, Index>& s, uint32_t slots, int n, int count) {
    for (uint32_t i = threadIdx.x; i < slots; i += blockDim.x) s.table[i] = 0;
    if (threadIdx.x == 0) s.counter[0] = 0;
    __syncthreads();
    uint32_t repeats = 0;
    for (int t = threadIdx.x; t < count; t += blockDim.x) {
        uint32_t id;
        if (n == 1) {
            const Token token = s.tokens[t];
            id = find_or_insert(
                s.table, slots - 1, static_cast<uint64_t>(token), t, [&](uint32_t p) { return s.tokens[p] == token; });
        } else {
            const Index first = s.ids[t], second = s.ids[t + 1];
            id = find_or_insert(s.table, slots - 1, static_cast<uint64_t>(first) << 32 | second, t, [&](uint32_t p) {
                return s.ids[p] == first && s.ids[p + 1] == second;
            });
        }
        s.next_ids[t] = static_cast<Index>(id);
        repeats += id != static_cast<uint32_t>(t);
    }
    if (repeats) atomicAdd(&s.counter[0], repeats);
    __syncthreads();
    const uint32_t total = s.counter[0];
    Index* const old = s.ids;
    s.ids = s.next_ids;
    s.next_ids = old;
    __syncthreads();  // before the next level clears the counter and the table
    return total;
}

template <class Token, class Index>
__device__ void count_windows(RowScratch<Token, Index>& s, const RepetitionPlan& plan, int length, float* out) {
    for (int t = threadIdx.x; t < length; t += blockDim.x) {
        const Token token = s.tokens[t];
        const int reach = t < plan.widest_window ? t : plan.widest_window;
        int back = 1;
        while (back <= reach && s.tokens[t - back] != token) ++back;
        s.distance[t] = static_cast<Index>(back <= reach ? back : 0);
    }
    for (int i = 0; i < plan.window_count; ++i) {
        if (threadIdx.x == 0) s.counter[1] = 0;
        __syncthreads();
        uint32_t hits = 0;
        for (int t = threadIdx.x; t < length; t += blockDim.x)
            hits += s.distance[t] != 0 && static_cast<int32_t>(s.distance[t]) <= plan.windows[i];
        if (hits) atomicAdd(&s.counter[1], hits);
        __syncthreads();
        if (threadIdx.x == 0) out[i] = length > 0 ? static_cast<float>(double(s.counter[1]) / double(length)) : 0.0f;
        __syncthreads();
    }
}

// out[ngram_count + window_count] of one row, by the whole block.
template <class Token, class Index>
__device__ void repetition_row(
    const Token* row, int length, RowScratch<Token, Index> s, uint32_t slots, const RepetitionPlan& plan, float* out) {
    for (int t = threadIdx.x; t < length; t += blockDim.x) s.tokens[t] = row[t];
    for (int i = threadIdx.x; i < plan.ngram_count; i += blockDim.x) out[i] = 0.0f;
    __syncthreads();
    for (int n = 1; n <= plan.longest_ngram && n <= length; ++n) {
        const int count = length - n + 1;
        const uint32_t repeats = level(s, slots, n, count);
        if (repeats == 0) break;  // and so does no longer n-gram: their columns stay 0
        for (int i = threadIdx.x; i < plan.ngram_count; i += blockDim.x)
            if (plan.ngrams[i] == n)
                out[i] = static_cast<float>(1.0 - double(count - static_cast<int>(repeats)) / double(count));
    }
    if (plan.window_count) count_windows(s, plan, length, out + plan.ngram_count);
    __syncthreads();  // the next row of this block overwrites the scratch
}

}  // namespace daemon_fast::cuda
