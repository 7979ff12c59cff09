// token_logprobs on CUDA: launch. The kernel is in token_logprobs.cuh.
#include "cuda/token_logprobs.cuh"

#include "cuda/logits.h"

namespace daemon_fast::cuda {
namespace {

template <class Run>
void with_id_type(const Tensor& ids, const Run& run) {
    ids.scalar_type() == ScalarType::Long ? run(int64_t{}) : run(int32_t{});
}

std::tuple<Tensor, Tensor> token_logprobs(Tensor logits, Tensor ids, double temperature) {
    check_token_logprobs("token_logprobs", logits, ids, temperature);
    const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
    const int64_t R = logits.size(0);
    const int V = vocabulary("token_logprobs", logits);
    if (V > 1 && logits.stride(1) != 1) logits = torch::stable::contiguous(logits);
    Tensor log_p = empty_like_with(logits, {R}, ScalarType::Float);
    Tensor log_q = empty_like_with(logits, {R}, ScalarType::Float);
    if (R == 0) return {log_p, log_q};

    with_logits(logits, temperature, [&](auto logit, auto tempered) {
        using Logit = decltype(logit);
        with_id_type(ids, [&](auto id) {
            using Id = decltype(id);
            launch(
                "token_logprobs", logits, token_logprobs_kernel<Logit, Id, tempered.value, kLogitThreads>, R,
                kLogitThreads, 0, static_cast<const Logit*>(logits.const_data_ptr()), logits.stride(0),
                ids.const_data_ptr<Id>(), ids.stride(0), R, V, Temperature(temperature),
                log_p.mutable_data_ptr<float>(), log_q.mutable_data_ptr<float>());
        });
    });
    return {log_p, log_q};
}

Tensor token_logprobs_backward(Tensor grad_log_p, Tensor grad_log_q, Tensor logits, Tensor ids, double temperature) {
    check_token_logprobs_backward(grad_log_p, grad_log_q, logits, ids, temperature);
    const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
    const int64_t R = logits.size(0);
    const int V = vocabulary("token_logprobs_backward", logits);
    if (V > 1 && logits.stride(1) != 1) logits = torch::stable::contiguous(logits);
    Tensor grad = empty_like_with(logits, {R, V}, logits.scalar_type());
    if (R == 0) return grad;

    with_logits(logits, temperature, [&](auto logit, auto tempered) {
        using Logit = decltype(logit);
        with_id_type(ids, [&](auto id) {
            using Id = decltype(id);
            launch(
                "token_logprobs_backward", logits,
                token_logprobs_backward_kernel<Logit, Id, tempered.value, kLogitThreads>, R, kLogitThreads, 0,
                grad_log_p.const_data_ptr<float>(), grad_log_p.stride(0), grad_log_q.const_data_ptr<float>(),
                grad_log_q.stride(0), static_cast<const Logit*>(logits.const_data_ptr()), logits.stride(0),
                ids.const_data_ptr<Id>(), ids.stride(0), R, V, Temperature(temperature),
                static_cast<Logit*>(grad.mutable_data_ptr()));
        });
    });
    return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(daemon_fast, CUDA, m) {
    m.impl("token_logprobs", TORCH_BOX(&token_logprobs));
    m.impl("token_logprobs_backward", TORCH_BOX(&token_logprobs_backward));
}

}  // namespace daemon_fast::cuda
