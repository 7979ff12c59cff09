// repetition on CUDA: kernel and launch. The algorithm is in repetition.cuh.
#include "cuda/repetition.cuh"

#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

#include <limits>

#include "checks.h"
#include "cuda/launch.h"
#include "ops.h"

namespace daemon_fast::cuda {
namespace {

constexpr int kThreads = 128;    // a row of 256 tokens gives each thread two
constexpr int kBlocksPerSm = 8;  // of the global-memory path, whose scratch is allocated per block
constexpr int64_t kSlotsPerToken = 2;

// Rows r = blockIdx.x, blockIdx.x + gridDim.x, ...: a grid of one block a row when the scratch is in shared memory.
template <class Token, class Index>
__global__ void __launch_bounds__(kThreads) repetition_kernel(
    const Token* tokens, int64_t row_stride, const void* lengths, bool wide_lengths, int64_t length_stride, int64_t R,
    int64_t T, uint32_t slots, RepetitionPlan plan, char* global_scratch, int64_t scratch_bytes, float* out) {
    extern __shared__ __align__(16) char shared_scratch[];
    char* const scratch = global_scratch ? global_scratch + blockIdx.x * scratch_bytes : shared_scratch;
    const int columns = plan.ngram_count + plan.window_count;
    for (int64_t r = blockIdx.x; r < R; r += gridDim.x) {
        const int64_t length = wide_lengths ? static_cast<const int64_t*>(lengths)[r * length_stride]
                                            : static_cast<const int32_t*>(lengths)[r * length_stride];
        float* const row_out = out + r * columns;
        if (length < 0 || length > T) {  // can't be reported without a synchronisation: the row becomes NaN
            for (int i = threadIdx.x; i < columns; i += blockDim.x) row_out[i] = __int_as_float(0x7fc00000);
            continue;
        }
        repetition_row<Token, Index>(
            tokens + r * row_stride, static_cast<int>(length), RowScratch<Token, Index>(scratch, T, slots), slots, plan,
            row_out);
    }
}

template <class Token, class Index>
void launch(const Tensor& tokens, const Tensor& lengths, const RepetitionPlan& plan, Tensor& out) {
    const int64_t R = tokens.size(0), T = tokens.size(1);
    const int device = tokens.get_device_index();
    uint32_t slots = 32;
    while (slots < kSlotsPerToken * T) slots *= 2;
    const int64_t bytes = RowScratch<Token, Index>::bytes(T, slots);
    const bool shared = bytes <= device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    const int64_t blocks =
        shared ? std::min<int64_t>(R, std::numeric_limits<int32_t>::max())
               : std::min<int64_t>(R, kBlocksPerSm * device_attribute(cudaDevAttrMultiProcessorCount, device));

    const auto kernel = repetition_kernel<Token, Index>;
    std::optional<Tensor> scratch;
    if (!shared)
        scratch = empty_like_with(tokens, {blocks * bytes}, ScalarType::Byte);
    else if (bytes > 48 * 1024)
        check_cuda(
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
            "repetition: shared memory", tokens);
    kernel<<<
        static_cast<unsigned>(blocks), kThreads, shared ? static_cast<size_t>(bytes) : 0, current_stream(device)>>>(
        tokens.const_data_ptr<Token>(), tokens.stride(0), lengths.const_data_ptr(),
        lengths.scalar_type() == ScalarType::Long, lengths.stride(0), R, T, slots, plan,
        scratch ? static_cast<char*>(scratch->mutable_data_ptr()) : nullptr, bytes, out.mutable_data_ptr<float>());
    check_cuda(cudaGetLastError(), "repetition", tokens);
}

void fill_plan(const std::vector<int64_t>& from, int64_t limit, const char* name, int32_t* to, int32_t* most) {
    if (from.size() > kMaxColumns)
        fail("repetition: ", name, " has ", from.size(), " entries, more than the ", kMaxColumns, " of a CUDA call");
    *most = 0;
    for (size_t i = 0; i < from.size(); ++i) {
        to[i] = static_cast<int32_t>(std::min(from[i], limit));
        *most = std::max(*most, to[i]);
    }
}

}  // namespace

Tensor repetition(Tensor tokens, Tensor lengths, std::vector<int64_t> ngrams, std::vector<int64_t> windows) {
    check_repetition(tokens, lengths, ngrams, windows);
    const int64_t R = tokens.size(0), T = tokens.size(1);
    constexpr int64_t kMaxTokens = int64_t{1} << 29;  // 2 slots a token, counted in 32 bits
    if (T > kMaxTokens) fail("repetition: tokens.shape[1] = ", T, " exceeds the maximum ", kMaxTokens, " on CUDA");
    RepetitionPlan plan{};
    plan.ngram_count = static_cast<int>(ngrams.size());
    plan.window_count = static_cast<int>(windows.size());
    fill_plan(ngrams, T + 1, "ngrams", plan.ngrams, &plan.longest_ngram);
    fill_plan(windows, std::max<int64_t>(T, 1), "windows", plan.windows, &plan.widest_window);

    const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
    Tensor out = empty_like_with(tokens, {R, plan.ngram_count + plan.window_count}, ScalarType::Float);
    if (out.numel() == 0) return out;
    if (T > 1 && tokens.stride(1) != 1) tokens = torch::stable::contiguous(tokens);
    const auto with_index = [&](auto token) {
        using Token = decltype(token);
        if (T <= std::numeric_limits<uint16_t>::max())
            launch<Token, uint16_t>(tokens, lengths, plan, out);
        else
            launch<Token, uint32_t>(tokens, lengths, plan, out);
    };
    tokens.scalar_type() == ScalarType::Long ? with_index(int64_t{}) : with_index(int32_t{});
    return out;
}

}  // namespace daemon_fast::cuda
