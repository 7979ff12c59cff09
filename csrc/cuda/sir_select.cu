// sir_select on CUDA: launch. The kernel is in sir_select.cuh.
#include "cuda/sir_select.cuh"

#include "cuda/groups.h"

namespace daemon_fast::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> sir_select(
    Tensor features, Tensor mu, Tensor uniforms, std::optional<Tensor> base_log_w) {
    check_sir_select(features, mu, uniforms, base_log_w);
    const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
    const bool several = uniforms.dim() == 2;
    const SelectShape shape{
        features.size(0), features.size(1), features.size(2), several ? uniforms.size(1) : int64_t{1}};
    const ScalarType type = features.scalar_type();
    features = torch::stable::contiguous(features);
    mu = torch::stable::contiguous(mu);
    uniforms = torch::stable::contiguous(uniforms);
    if (base_log_w) base_log_w = torch::stable::contiguous(*base_log_w);
    Tensor index = empty_like_with(
        features, several ? std::vector<int64_t>{shape.G, shape.S} : std::vector<int64_t>{shape.G}, ScalarType::Long);
    Tensor weights = empty_like_with(features, {shape.G, shape.M}, type);
    Tensor log_z = empty_like_with(features, {shape.G}, type);
    Tensor ess = empty_like_with(features, {shape.G}, type);
    if (shape.G == 0) return {index, weights, log_z, ess};

    GroupLaunch groups(features, shape.G, shape.M, 2 * shape.M);
    with_base(features, base_log_w, [&](auto feature, auto base) {
        using Feature = decltype(feature);
        using Base = decltype(base);
        groups.dispatch([&](auto threads, auto shared) {
            launch(
                "sir_select", features, sir_select_kernel<Feature, Base, threads.value, shared.value>, groups.blocks,
                threads.value, groups.shared_bytes, features.const_data_ptr<Feature>(), mu.const_data_ptr<double>(),
                base_log_w ? base_log_w->const_data_ptr<Base>() : nullptr, uniforms.const_data_ptr<double>(), shape,
                groups.scratch(), index.mutable_data_ptr<int64_t>(), weights.mutable_data_ptr<Feature>(),
                log_z.mutable_data_ptr<Feature>(), ess.mutable_data_ptr<Feature>());
        });
    });
    return {index, weights, log_z, ess};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(daemon_fast, CUDA, m) {
    m.impl("sir_select", TORCH_BOX(&sir_select));
}

}  // namespace daemon_fast::cuda
