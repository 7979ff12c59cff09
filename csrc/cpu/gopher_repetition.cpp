// gopher_repetition: characters in repeated word n-grams of texts. On the CPU only, where the strings are.
//
// Two n-grams are equal if their strings are, as in datatrove: joined by spaces for the most frequent one, by nothing
// for those that occur twice, where "can not" and "cannot" plus a word may meet. A prefix of polynomial hashes gives
// the hash of any n-gram by one multiplication; equal hashes are always compared by their characters, so that results
// are exact whatever the hash does.
#include <algorithm>
#include <cstring>
#include <limits>

#include "checks.h"

namespace daemon_fast::cpu {
namespace {

constexpr uint64_t kBase = 0x9E3779B97F4A7C15ull;
constexpr int64_t kSlotsPerKey = 2;
constexpr int32_t kBetweenWords = -1, kByItself = -2;  // kByItself - c: the character c, which is a word by itself

template <class Element>
Element at(const std::vector<Element>& elements, int64_t i) {
    return elements[static_cast<size_t>(i)];
}

// The words of one text as one string of code points.
struct Words {
    std::vector<int32_t> characters;
    std::vector<int64_t> begins;   // [count + 1] of each word; last, the end
    std::vector<uint64_t> hashes;  // [count + 1] of all that is before it

    uint64_t hash_of_all = 0;

    void clear() {
        characters.clear();
        begins.assign(1, 0);
        hashes.assign(1, 0);
        hash_of_all = 0;
    }

    void add(int32_t character) {
        characters.push_back(character);
        hash_of_all = hash_of_all * kBase + static_cast<uint32_t>(character) + 1;
    }

    void end_word() {
        begins.push_back(static_cast<int64_t>(characters.size()));
        hashes.push_back(hash_of_all);
    }

    int64_t count() const { return static_cast<int64_t>(begins.size()) - 1; }

    int64_t length(int64_t w, int64_t n) const { return at(begins, w + n) - at(begins, w); }

    uint64_t hash(int64_t w, int64_t n, const std::vector<uint64_t>& powers) const {
        return at(hashes, w + n) - at(hashes, w) * at(powers, length(w, n));
    }

    bool equal(int64_t a, int64_t b, int64_t n) const {
        const int64_t size = length(a, n);
        const int32_t* const from = characters.data();
        return size == length(b, n) &&
               std::memcmp(from + at(begins, a), from + at(begins, b), sizeof(int32_t) * static_cast<size_t>(size)) ==
                   0;
    }
};

// The n-grams seen so far, each by the word where it first began.
class Seen {
    struct Slot {
        uint32_t hash, first;  // the low bits of the hash, the high ones chose the slot; kFree
    };
    static constexpr uint32_t kFree = std::numeric_limits<uint32_t>::max();
    std::vector<Slot> slots_;
    int bits_ = 0;

 public:
    void clear(int64_t keys) {
        bits_ = 4;
        while ((int64_t{1} << bits_) < kSlotsPerKey * keys) ++bits_;
        slots_.assign(size_t{1} << bits_, {0, kFree});
    }

    // Where an equal n-gram first began; w, if there is none, which is then the first.
    int64_t first(const Words& words, int64_t w, int64_t n, uint64_t hash) {
        const uint64_t mask = slots_.size() - 1;
        for (uint64_t i = (hash * kBase) >> (64 - bits_);; i = (i + 1) & mask) {
            Slot& slot = slots_[i];
            if (slot.first == kFree) {
                slot = {static_cast<uint32_t>(hash), static_cast<uint32_t>(w)};
                return w;
            }
            if (slot.hash == static_cast<uint32_t>(hash) && words.equal(slot.first, w, n)) return slot.first;
        }
    }
};

// What is kept from text to text, to allocate once.
struct Scratch {
    Words spaced, joined;          // each word with a space behind it; words alone
    std::vector<uint64_t> powers;  // of kBase
    std::vector<int64_t> occurrences;
    Seen seen;

    void read(const int32_t* characters, int64_t count) {
        spaced.clear();
        joined.clear();
        bool inside = false;
        for (int64_t i = 0; i < count; ++i) {
            const int32_t character = characters[i];
            if (inside && character < 0) end_word();
            inside = character >= 0;
            if (character == kBetweenWords) continue;
            add(inside ? character : kByItself - character);
            if (!inside) end_word();
        }
        if (inside) end_word();
        if (powers.empty()) powers.push_back(1);
        while (powers.size() <= spaced.characters.size()) powers.push_back(powers.back() * kBase);
    }

 private:
    void add(int32_t character) {
        spaced.add(character);
        joined.add(character);
    }

    void end_word() {
        spaced.add(' ');
        spaced.end_word();
        joined.end_word();
    }
};

// Occurrences times length of the n-gram that occurs most often; of several, the one that comes first.
int64_t characters_of_top(Scratch& s, int64_t n) {
    const Words& words = s.spaced;
    const int64_t count = words.count() - n + 1;
    if (count <= 0) return 0;
    s.seen.clear(count);
    s.occurrences.assign(static_cast<size_t>(count), 0);
    for (int64_t w = 0; w < count; ++w)
        ++s.occurrences[static_cast<size_t>(s.seen.first(words, w, n, words.hash(w, n, s.powers)))];
    const auto top = std::max_element(s.occurrences.begin(), s.occurrences.end());
    return *top * (words.length(top - s.occurrences.begin(), n) - 1);  // without the space behind its last word
}

// Characters of the n-grams that have occurred before, reading on behind each of them.
int64_t characters_of_duplicates(Scratch& s, int64_t n) {
    const Words& words = s.joined;
    const int64_t count = words.count() - n + 1;
    if (count <= 0) return 0;
    s.seen.clear(count);
    int64_t characters = 0;
    for (int64_t w = 0; w < count;) {
        const bool repeated = s.seen.first(words, w, n, words.hash(w, n, s.powers)) != w;
        if (repeated) characters += words.length(w, n);
        w += repeated ? n : 1;
    }
    return characters;
}

Tensor gopher_repetition(
    Tensor characters, Tensor text_ends, std::vector<int64_t> top, std::vector<int64_t> duplicated) {
    check_gopher_repetition(characters, text_ends, top, duplicated);
    characters = torch::stable::contiguous(characters);
    text_ends = torch::stable::contiguous(text_ends);
    const int64_t C = characters.size(0), N = text_ends.size(0);
    const int32_t* const character_of = characters.const_data_ptr<int32_t>();
    const int64_t* const end_of = text_ends.const_data_ptr<int64_t>();
    if (C >= std::numeric_limits<uint32_t>::max())
        fail(
            "gopher_repetition: characters.shape[0] = ", C, " exceeds the maximum ",
            std::numeric_limits<uint32_t>::max() - 1);
    for (int64_t r = 0; r < N; ++r) {
        const int64_t begin = r ? end_of[r - 1] : 0, end = end_of[r];
        if (end < begin || end > C)
            fail("gopher_repetition: text_ends[", r, "] = ", end, " is not in [", begin, ", ", C, "]");
    }

    const auto columns = static_cast<int64_t>(top.size() + duplicated.size());
    Tensor out = empty_like_with(text_ends, {N, columns}, ScalarType::Long);
    if (N == 0 || columns == 0) return out;
    int64_t* const first_column = out.mutable_data_ptr<int64_t>();
    torch::stable::parallel_for(0, N, 16, [&](int64_t from, int64_t to) {
        Scratch scratch;
        for (int64_t r = from; r < to; ++r) {
            const int64_t begin = r ? end_of[r - 1] : 0;
            scratch.read(character_of + begin, end_of[r] - begin);
            int64_t* column = first_column + r * columns;
            for (const int64_t n : top) *column++ = characters_of_top(scratch, n);
            for (const int64_t n : duplicated) *column++ = characters_of_duplicates(scratch, n);
        }
    });
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(daemon_fast, m) {
    m.def("gopher_repetition(Tensor characters, Tensor text_ends, int[] top, int[] duplicated) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(daemon_fast, CPU, m) {
    m.impl("gopher_repetition", TORCH_BOX(&gopher_repetition));
}

}  // namespace daemon_fast::cpu
