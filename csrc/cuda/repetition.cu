// repetition on CUDA: launch. The kernel is in repetition.cuh.
#include "cuda/repetition.cuh"

#include "cuda/launch.h"

namespace daemon_fast::cuda {
namespace {

void fill_plan(const std::vector<int64_t>& from, int64_t limit, const char* name, int32_t* to) {
    if (from.size() > kMaxColumns)
        fail("repetition: ", name, " has ", from.size(), " entries, more than the ", kMaxColumns, " of a CUDA call");
    for (size_t i = 0; i < from.size(); ++i) to[i] = static_cast<int32_t>(std::min(from[i], limit));
}

Tensor repetition(Tensor tokens, Tensor lengths, std::vector<int64_t> ngrams, std::vector<int64_t> windows) {
    check_repetition(tokens, lengths, ngrams, windows);
    const int device = tokens.get_device_index();
    const int64_t R = tokens.size(0), T = tokens.size(1);
    constexpr int64_t kMaxTokens = int64_t{1} << 29;  // 2 slots a token, counted in 32 bits
    if (T > kMaxTokens) fail("repetition: tokens.shape[1] = ", T, " exceeds the maximum ", kMaxTokens, " on CUDA");
    RepetitionPlan plan{};
    plan.ngram_count = static_cast<int>(ngrams.size());
    plan.window_count = static_cast<int>(windows.size());
    fill_plan(ngrams, T + 1, "ngrams", plan.ngrams);
    fill_plan(windows, std::max<int64_t>(T, 1), "windows", plan.windows);
    plan.longest_ngram = *std::max_element(plan.ngrams, plan.ngrams + kMaxColumns);

    const torch::stable::accelerator::DeviceGuard guard(device);
    Tensor out = empty_like_with(tokens, {R, plan.ngram_count + plan.window_count}, ScalarType::Float);
    if (out.numel() == 0) return out;
    if (T > 1 && tokens.stride(1) != 1) tokens = torch::stable::contiguous(tokens);
    const auto run = [&](auto token, auto position) {
        using Token = decltype(token);
        using Index = decltype(position);
        const int64_t bytes = RowScratch<Token, Index>::bytes(T);
        const auto in_shared = repetition_kernel<Token, Index, true>;
        const auto in_global = repetition_kernel<Token, Index, false>;
        const bool shared = bytes <= shared_bytes_for(bytes, in_shared, device);
        const int64_t blocks = shared ? R : blocks_with_scratch(R, bytes, device);
        std::optional<Tensor> scratch;
        if (!shared) scratch = empty_like_with(tokens, {blocks * bytes}, ScalarType::Byte);
        launch(
            "repetition", tokens, shared ? in_shared : in_global, blocks, repetition_threads(T), shared ? bytes : 0,
            tokens.const_data_ptr<Token>(), tokens.stride(0), lengths.const_data_ptr(),
            lengths.scalar_type() == ScalarType::Long, lengths.stride(0), R, T, plan,
            scratch ? static_cast<char*>(scratch->mutable_data_ptr()) : nullptr, out.mutable_data_ptr<float>());
    };
    const auto with_index = [&](auto token) {
        T < std::numeric_limits<uint16_t>::max() ? run(token, uint16_t{}) : run(token, uint32_t{});
    };
    tokens.scalar_type() == ScalarType::Long ? with_index(int64_t{}) : with_index(int32_t{});
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(daemon_fast, CUDA, m) {
    m.impl("repetition", TORCH_BOX(&repetition));
}

}  // namespace daemon_fast::cuda
