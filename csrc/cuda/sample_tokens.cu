// sample_tokens on CUDA: launch. The kernel is in sample_tokens.cuh.
#include "cuda/sample_tokens.cuh"

#include "cuda/logits.h"

namespace daemon_fast::cuda {
namespace {

constexpr int kThreads = 512;

std::tuple<Tensor, Tensor, Tensor> sample_tokens(Tensor logits, Tensor uniforms, double temperature) {
    check_sample_tokens(logits, uniforms, temperature);
    const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
    const int64_t R = logits.size(0), V = logits.size(1);
    if (V > 1 && logits.stride(1) != 1) logits = torch::stable::contiguous(logits);
    Tensor ids = empty_like_with(logits, {R}, ScalarType::Long);
    Tensor log_p = empty_like_with(logits, {R}, ScalarType::Float);
    Tensor log_q = empty_like_with(logits, {R}, ScalarType::Float);
    if (R == 0) return {ids, log_p, log_q};

    with_logits(logits, temperature, [&](auto logit, auto tempered) {
        using Logit = decltype(logit);
        launch(
            "sample_tokens", logits, sample_tokens_kernel<Logit, tempered.value, kThreads>, R, kThreads, 0,
            static_cast<const Logit*>(logits.const_data_ptr()), logits.stride(0), uniforms.const_data_ptr<double>(),
            uniforms.stride(0), R, V, static_cast<float>(1.0 / temperature), ids.mutable_data_ptr<int64_t>(),
            log_p.mutable_data_ptr<float>(), log_q.mutable_data_ptr<float>());
    });
    return {ids, log_p, log_q};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(daemon_fast, CUDA, m) {
    m.impl("sample_tokens", TORCH_BOX(&sample_tokens));
}

}  // namespace daemon_fast::cuda
