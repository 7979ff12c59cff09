// One row of repetition on the CPU: distinct n-grams and near-by token repeats, exactly. No torch in here: the tests
// run it on another architecture too.
//
// One pass finds, for each position t, the last earlier position q with the same token (t itself if there is
// none). It gives all windows at once, t - q being the distance to the repeat, and an id per token: the
// position where it first occurred. An (n+1)-gram is then the pair (id of its first n-gram, id of its second),
// two neighbours of one array, read as one word. It can repeat only where both of its n-grams do, so each level
// visits only the positions that the level below left over; on text that is a small part.
//
// Speed. The hash tables hold positions, not keys: 2 bytes a slot, few enough to clear for each row and to stay in
// the L1 cache. Whether a slot is free or holds an equal key takes the same path (a free slot reads as position t,
// which equals itself), so that the only branch that can mispredict is a true collision. Results are exact
// whatever the hash does: keys are always compared.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"

namespace daemon_fast::cpu {

// 16 slots a key: fewer, and collisions cost more than clearing does. Beyond 32 KiB the table crowds out the rest of
// the L1 cache, which costs more than collisions do; 4 slots a key are then enough.
constexpr int64_t kRoomySlots = 16, kTightSlots = 4, kRoomyTable = 16384;
// Loads of 8 flags reach this far behind the end of a row.
constexpr int64_t kPad = 72;

struct Plan {
    std::vector<int64_t> ngrams, windows;
    int64_t levels = 1;  // the longest n-gram asked for that fits into a row of T tokens

    Plan(std::vector<int64_t> ngrams, std::vector<int64_t> windows, int64_t T)
        : ngrams(std::move(ngrams)), windows(std::move(windows)) {
        for (const int64_t n : this->ngrams) levels = std::max(levels, std::min(n, T));
    }
    int64_t columns() const { return static_cast<int64_t>(ngrams.size() + windows.size()); }
};

DAEMON_FAST_INLINE int table_bits(int64_t keys) {
    const int64_t roomy = std::min(kRoomySlots * keys, kRoomyTable);
    const int64_t slots = std::max({roomy, kTightSlots * keys, kRoomySlots});
    return 64 - __builtin_clzll(static_cast<uint64_t>(slots - 1));
}

// Fibonacci hashing: the high bits of a product by 2^64 / golden ratio.
DAEMON_FAST_INLINE uint64_t slot_of(uint64_t key, int bits) {
    return (key * 0x9E3779B97F4A7C15ull) >> (64 - bits);
}

template <class Word, class Element>
DAEMON_FAST_INLINE Word load(const Element* from) {
    Word word;
    std::memcpy(&word, from, sizeof word);
    return word;
}

// Working memory for rows of up to T tokens. Index holds positions 0 .. T - 1 and one value more, "none".
template <class Index>
struct Scratch {
    using Pair = std::conditional_t<sizeof(Index) == 2, uint32_t, uint64_t>;
    static constexpr Index kNone = std::numeric_limits<Index>::max();

    std::unique_ptr<Index[]> table, distance, ids, next_ids;
    std::unique_ptr<uint8_t[]> repeated, next_repeated;  // 1 where the n-gram occurs more than once in the row
    std::unique_ptr<uint64_t[]> candidates;              // bit t: both n-grams of the (n+1)-gram at t repeat
    std::vector<int64_t> repeats;                        // [levels + 1] n-grams that have occurred before

    Scratch(int64_t T, int64_t levels)
        : table(new Index[int64_t{1} << table_bits(T)]),
          distance(new Index[T + kPad]),
          ids(new Index[T + kPad]),
          next_ids(new Index[T + kPad]),
          repeated(new uint8_t[T + kPad]),
          next_repeated(new uint8_t[T + kPad]),
          candidates(new uint64_t[T / 64 + 2]),
          repeats(static_cast<size_t>(levels + 1)) {}
};

template <class Token, class Index>
DAEMON_FAST_INLINE void scan_tokens(const Token* tokens, int64_t length, Scratch<Index>& s) {
    const int bits = table_bits(length);
    const uint64_t mask = (uint64_t{1} << bits) - 1;
    Index* const table = s.table.get();
    Index* const distance = s.distance.get();
    Index* const ids = s.ids.get();
    uint8_t* const repeated = s.repeated.get();
    std::memset(table, 0xff, sizeof(Index) << bits);

    int64_t repeats = 0;
    for (uint32_t t = 0; t < static_cast<uint32_t>(length); ++t) {
        const Token token = tokens[t];
        uint64_t slot = slot_of(static_cast<uint64_t>(token), bits);
        uint32_t q;
        for (;; slot = (slot + 1) & mask) {
            const uint32_t last = table[slot];
            q = last < t ? last : t;
            if (__builtin_expect(tokens[q] == token, 1)) break;
        }
        const bool hit = q != t;
        table[slot] = static_cast<Index>(t);
        distance[t] = static_cast<Index>(t - q);
        ids[t] = static_cast<Index>(t);
        ids[t] = ids[q];
        repeated[t] = hit;
        repeated[q] = hit;
        repeats += hit;
    }
    s.repeats[1] = repeats;
}

// Marks in `candidates` the positions t < count whose two n-grams, at t and t + 1, both repeat. Returns how many.
template <class Index>
DAEMON_FAST_INLINE int64_t find_candidates(int64_t count, Scratch<Index>& s) {
    const uint8_t* const flags = s.repeated.get();
    int64_t found = 0;
    for (int64_t base = 0; base < count; base += 64) {
        uint64_t bits = 0;
        for (int byte = 0; byte < 8; ++byte) {
            const uint8_t* from = flags + base + 8 * byte;
            const uint64_t both = load<uint64_t>(from) & load<uint64_t>(from + 1);
            bits |= ((both * 0x0102040810204080ull) >> 56) << (8 * byte);  // gathers the 8 low bits into a byte
        }
        if (count - base < 64) bits &= (uint64_t{1} << (count - base)) - 1;
        s.candidates[base / 64] = bits;
        found += __builtin_popcountll(bits);
    }
    return found;
}

// From n-grams to (n+1)-grams at the candidate positions below `count`; `found` of them.
template <class Index>
DAEMON_FAST_INLINE int64_t scan_pairs(int64_t count, int64_t found, int64_t length, Scratch<Index>& s) {
    using Pair = typename Scratch<Index>::Pair;
    const int bits = table_bits(found);
    const uint64_t mask = (uint64_t{1} << bits) - 1;
    Index* const table = s.table.get();
    const Index* const ids = s.ids.get();
    Index* const next_ids = s.next_ids.get();
    uint8_t* const repeated = s.next_repeated.get();
    std::memset(table, 0xff, sizeof(Index) << bits);
    std::memset(repeated, 0, static_cast<size_t>(length + kPad));

    int64_t repeats = 0;
    for (int64_t base = 0; base < count; base += 64) {
        for (uint64_t rest = s.candidates[base / 64]; rest; rest &= rest - 1) {
            const uint32_t t = static_cast<uint32_t>(base) + static_cast<uint32_t>(__builtin_ctzll(rest));
            const Pair pair = load<Pair>(ids + t);
            uint64_t slot = slot_of(pair, bits);
            uint32_t q;
            for (;; slot = (slot + 1) & mask) {
                const uint32_t first = table[slot];
                q = first < t ? first : t;
                if (__builtin_expect(load<Pair>(ids + q) == pair, 1)) break;
            }
            const bool hit = q != t;
            table[slot] = static_cast<Index>(q);
            next_ids[t] = static_cast<Index>(q);
            repeated[t] = hit;
            repeated[q] = hit;
            repeats += hit;
        }
    }
    std::swap(s.ids, s.next_ids);
    std::swap(s.repeated, s.next_repeated);
    return repeats;
}

// Positions whose last repeat lies at most `window` back. A distance of 0 means that there is none. Counting in Index,
// which holds every length, keeps the vectors narrow.
template <class Index>
DAEMON_FAST_INLINE Index count_within(const Index* distance, int64_t length, int64_t window) {
    const Index limit = static_cast<Index>(window < Scratch<Index>::kNone ? window : int64_t{Scratch<Index>::kNone});
    Index hits = 0;
    for (int64_t t = 0; t < length; ++t)
        hits = static_cast<Index>(hits + (static_cast<Index>(distance[t] - 1) < limit));
    return hits;
}

// Each phase is dispatched by itself: inlined into one function, they spill each other's registers (3.9 ns a token
// instead of 3.0).
template <class Token, class Index>
void repetition_row(const Token* tokens, int64_t length, const Plan& plan, Scratch<Index>& s, float* out) {
    std::fill(s.repeats.begin(), s.repeats.end(), 0);
    if (length > 0) {
        dispatch([&]() DAEMON_FAST_INLINE_LAMBDA { scan_tokens(tokens, length, s); });
        std::memset(s.repeated.get() + length, 0, kPad);
    }
    for (int64_t n = 2; n <= plan.levels && n <= length; ++n) {
        const int64_t count = length - n + 1;
        int64_t found = 0;
        dispatch([&]() DAEMON_FAST_INLINE_LAMBDA { found = find_candidates(count, s); });
        if (found < 2) break;
        int64_t& repeats = s.repeats[static_cast<size_t>(n)];
        dispatch([&]() DAEMON_FAST_INLINE_LAMBDA { repeats = scan_pairs(count, found, length, s); });
    }
    for (const int64_t n : plan.ngrams) {
        const int64_t count = length - n + 1;
        if (count > 0) {
            const double distinct = static_cast<double>(count - s.repeats[static_cast<size_t>(n)]);
            *out++ = static_cast<float>(1.0 - distinct / static_cast<double>(count));
        } else {
            *out++ = 0.0f;
        }
    }
    for (const int64_t window : plan.windows) {
        Index hits = 0;
        dispatch([&]() DAEMON_FAST_INLINE_LAMBDA { hits = count_within<Index>(s.distance.get(), length, window); });
        *out++ = length > 0 ? static_cast<float>(static_cast<double>(hits) / static_cast<double>(length)) : 0.0f;
    }
}

}  // namespace daemon_fast::cpu
