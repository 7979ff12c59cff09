// importance_weights on CUDA: launch. The kernel is in importance_weights.cuh.
#include "cuda/importance_weights.cuh"

#include "cuda/groups.h"

namespace daemon_fast::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> importance_weights(Tensor log_w) {
    check_importance_weights(log_w);
    const torch::stable::accelerator::DeviceGuard guard(log_w.get_device_index());
    const int64_t G = log_w.size(0), M = log_w.size(1);
    const ScalarType type = log_w.scalar_type();
    log_w = torch::stable::contiguous(log_w);
    Tensor weights = empty_like_with(log_w, {G, M}, type);
    Tensor log_mean = empty_like_with(log_w, {G}, type);
    Tensor ess = empty_like_with(log_w, {G}, type);
    if (G == 0) return {weights, log_mean, ess};

    GroupLaunch groups(log_w, G, M, M);
    const auto run = [&](auto weight) {
        using Weight = decltype(weight);
        groups.dispatch([&](auto threads, auto shared) {
            launch(
                "importance_weights", log_w, importance_weights_kernel<Weight, threads.value, shared.value>,
                groups.blocks, threads.value, groups.shared_bytes, log_w.const_data_ptr<Weight>(), G, M,
                groups.scratch(), weights.mutable_data_ptr<Weight>(), log_mean.mutable_data_ptr<Weight>(),
                ess.mutable_data_ptr<Weight>());
        });
    };
    type == ScalarType::Double ? run(double{}) : run(float{});
    return {weights, log_mean, ess};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(daemon_fast, CUDA, m) {
    m.impl("importance_weights", TORCH_BOX(&importance_weights));
}

}  // namespace daemon_fast::cuda
