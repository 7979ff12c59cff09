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
    if (T > kMaxRepetitionTokens)
        fail("repetition: tokens.shape[1] = ", T, " exceeds the maximum ", kMaxRepetitionTokens, " on CUDA");
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
    const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, device);
    const auto run = [&](auto token) {
        using Token = decltype(token);
        const auto start = [&](auto threads, auto shared) {
            const RowLayout layout = RowScratch<Token, shared.value>::layout(T, threads.value);
            const int64_t blocks = shared.value ? R : blocks_with_scratch(R, layout.bytes, device);
            std::optional<Tensor> scratch;
            if (!shared.value) scratch = empty_like_with(tokens, {blocks * layout.bytes}, ScalarType::Byte);
            launch(
                "repetition", tokens, repetition_kernel<Token, threads.value, shared.value>, blocks, threads.value,
                shared.value ? layout.bytes : 0, tokens.const_data_ptr<Token>(), tokens.stride(0),
                lengths.const_data_ptr(), lengths.scalar_type() == ScalarType::Long, lengths.stride(0), R, T, plan,
                layout, scratch ? static_cast<char*>(scratch->mutable_data_ptr()) : nullptr,
                out.mutable_data_ptr<float>());
        };
        using OneWarp = std::integral_constant<int, kOneWarp>;
        using ManyWarps = std::integral_constant<int, kManyWarps>;
        const int64_t bytes = RowScratch<Token, true>::layout(T, kManyWarps).bytes;
        if (T > kMaxSharedTokens || bytes > shared_bytes_for(bytes, repetition_kernel<Token, kManyWarps, true>, device))
            start(ManyWarps(), std::false_type());
        else if (T <= kOneWarpTokens && R >= kOneWarpRows * multiprocessors)
            start(OneWarp(), std::true_type());
        else
            start(ManyWarps(), std::true_type());
    };
    tokens.scalar_type() == ScalarType::Long ? run(int64_t{}) : run(int32_t{});
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(daemon_fast, CUDA, m) {
    m.impl("repetition", TORCH_BOX(&repetition));
}

}  // namespace daemon_fast::cuda
