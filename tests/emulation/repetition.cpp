// csrc/cuda/repetition.cuh behind a C function: all rows of a call, by one emulated block.
#include "cuda.h"
//
#include "cuda/repetition.cuh"

#include <cstring>

using namespace daemon_fast::cuda;

template <class Token, class Index>
void run(
    const Token* tokens, const int64_t* lengths, int64_t R, int64_t T, const RepetitionPlan& plan, unsigned threads,
    float* out) {
    uint32_t slots = 32;
    while (slots < 2 * T) slots *= 2;
    const int64_t bytes = RowScratch<Token, Index>::bytes(T, slots);
    std::vector<char> scratch(static_cast<size_t>(bytes));
    std::memset(scratch.data(), 0xab, scratch.size());  // shared memory holds garbage at first
    run_block(threads, [&] {
        for (int64_t r = 0; r < R; ++r)
            repetition_row<Token, Index>(
                tokens + r * T, static_cast<int>(lengths[r]), RowScratch<Token, Index>(scratch.data(), T, slots), slots,
                plan, out + r * (plan.ngram_count + plan.window_count));
    });
}

extern "C" void emulate_repetition(
    const void* tokens, int token_bytes, int index_bytes, const int64_t* lengths, int64_t R, int64_t T,
    const int32_t* ngrams, int ngram_count, const int32_t* windows, int window_count, unsigned threads, float* out) {
    RepetitionPlan plan{};
    plan.ngram_count = ngram_count;
    plan.window_count = window_count;
    for (int i = 0; i < ngram_count; ++i) {
        plan.ngrams[i] = ngrams[i];
        plan.longest_ngram = std::max(plan.longest_ngram, ngrams[i]);
    }
    for (int i = 0; i < window_count; ++i) {
        plan.windows[i] = windows[i];
        plan.widest_window = std::max(plan.widest_window, windows[i]);
    }
    const auto with_index = [&](auto index) {
        using Index = decltype(index);
        if (token_bytes == 8)
            run<int64_t, Index>(static_cast<const int64_t*>(tokens), lengths, R, T, plan, threads, out);
        else
            run<int32_t, Index>(static_cast<const int32_t*>(tokens), lengths, R, T, plan, threads, out);
    };
    index_bytes == 2 ? with_index(uint16_t{}) : with_index(uint32_t{});
}
