// repetition on the CPU: rows spread over threads. What is done with a row is in repetition.h.
#include "cpu/repetition.h"

#include "checks.h"

namespace daemon_fast::cpu {
namespace {

template <class Token, class Index, class Length>
void repetition_rows(const Tensor& tokens, const Tensor& lengths, const Plan& plan, float* out) {
    const Token* const first = tokens.const_data_ptr<Token>();
    const Length* const length_of = lengths.const_data_ptr<Length>();
    const int64_t R = tokens.size(0), T = tokens.size(1);
    const int64_t row_stride = tokens.stride(0), length_stride = lengths.stride(0);
    // About 10 us of work a task, below which a second thread costs more than it brings.
    const int64_t grain = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, T));
    torch::stable::parallel_for(0, R, grain, [&](int64_t begin, int64_t end) {
        Scratch<Index> scratch(T, plan.levels);
        for (int64_t r = begin; r < end; ++r)
            repetition_row<Token, Index>(
                first + r * row_stride, static_cast<int64_t>(length_of[r * length_stride]), plan, scratch,
                out + r * plan.columns());
    });
}

template <class Length>
void check_lengths(const Tensor& lengths, int64_t T) {
    const Length* const length_of = lengths.const_data_ptr<Length>();
    for (int64_t r = 0; r < lengths.size(0); ++r) {
        const int64_t length = length_of[r * lengths.stride(0)];
        if (length < 0) fail("repetition: lengths[", r, "] = ", length, " is negative");
        if (length > T) fail("repetition: lengths[", r, "] = ", length, " exceeds tokens.shape[1] = ", T);
    }
}

Tensor repetition(Tensor tokens, Tensor lengths, std::vector<int64_t> ngrams, std::vector<int64_t> windows) {
    check_repetition(tokens, lengths, ngrams, windows);
    const int64_t R = tokens.size(0), T = tokens.size(1);
    const bool wide_lengths = lengths.scalar_type() == ScalarType::Long;
    wide_lengths ? check_lengths<int64_t>(lengths, T) : check_lengths<int32_t>(lengths, T);
    if (T >= std::numeric_limits<uint32_t>::max())
        fail("repetition: tokens.shape[1] = ", T, " exceeds the maximum ", std::numeric_limits<uint32_t>::max() - 1);

    const Plan plan(std::move(ngrams), std::move(windows), T);
    Tensor out = empty_like_with(tokens, {R, plan.columns()}, ScalarType::Float);
    if (R == 0 || plan.columns() == 0) return out;
    if (T > 1 && tokens.stride(1) != 1) tokens = torch::stable::contiguous(tokens);

    const auto run = [&](auto token, auto index, auto length) {
        repetition_rows<decltype(token), decltype(index), decltype(length)>(
            tokens, lengths, plan, out.mutable_data_ptr<float>());
    };
    const auto with_length = [&](auto token, auto index) {
        wide_lengths ? run(token, index, int64_t{}) : run(token, index, int32_t{});
    };
    const auto with_index = [&](auto token) {
        T < std::numeric_limits<uint16_t>::max() ? with_length(token, uint16_t{}) : with_length(token, uint32_t{});
    };
    tokens.scalar_type() == ScalarType::Long ? with_index(int64_t{}) : with_index(int32_t{});
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(daemon_fast, m) {
    m.def("repetition(Tensor tokens, Tensor lengths, int[] ngrams, int[] windows) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(daemon_fast, CPU, m) {
    m.impl("repetition", TORCH_BOX(&repetition));
}

}  // namespace daemon_fast::cpu
