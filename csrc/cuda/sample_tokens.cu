// sample_tokens on CUDA: launches. The kernels are in sample_tokens.cuh.
#include "cuda/sample_tokens.cuh"

#include "cuda/logits.h"

namespace daemon_fast::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> sample_tokens(Tensor logits, Tensor uniforms, double temperature) {
    check_sample_tokens(logits, uniforms, temperature);
    const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
    const int64_t R = logits.size(0);
    const int V = vocabulary("sample_tokens", logits);
    if (V > 1 && logits.stride(1) != 1) logits = torch::stable::contiguous(logits);
    Tensor ids = empty_like_with(logits, {R}, ScalarType::Long);
    Tensor log_p = empty_like_with(logits, {R}, ScalarType::Float);
    Tensor log_q = empty_like_with(logits, {R}, ScalarType::Float);
    if (R == 0) return {ids, log_p, log_q};

    with_logits(logits, temperature, [&](auto logit, auto tempered) {
        using Logit = decltype(logit);
        const Logit* const rows = static_cast<const Logit*>(logits.const_data_ptr());
        const Temperature by(temperature);
        const int64_t pieces = Pieces<Logit>::count(V), blocks = (pieces + kPieceWarps - 1) / kPieceWarps;
        Tensor scratch = empty_like_with(logits, {R * pieces * 3}, ScalarType::Float);
        LogSums* const sums = static_cast<LogSums*>(scratch.mutable_data_ptr());
        const int64_t rows_at_once = std::min(R, std::numeric_limits<int32_t>::max() / blocks);
        launch(
            "sample_tokens", logits, sum_pieces_kernel<Logit, tempered.value>, rows_at_once * blocks, kPieceThreads, 0,
            rows, logits.stride(0), R, V, static_cast<int>(pieces), by, sums);
        launch(
            "sample_tokens", logits, sample_tokens_kernel<Logit, tempered.value>, R, kDrawThreads, 0, rows,
            logits.stride(0), uniforms.const_data_ptr<double>(), uniforms.stride(0), R, V, static_cast<int>(pieces), by,
            sums, ids.mutable_data_ptr<int64_t>(), log_p.mutable_data_ptr<float>(), log_q.mutable_data_ptr<float>());
    });
    return {ids, log_p, log_q};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(daemon_fast, CUDA, m) {
    m.impl("sample_tokens", TORCH_BOX(&sample_tokens));
}

}  // namespace daemon_fast::cuda
