// The host side of sir_select and race_select on CUDA: launch. The kernel is in select.cuh.
#pragma once

#include "cuda/groups.h"
#include "cuda/select.cuh"

namespace daemon_fast::cuda {

template <class Rule>
std::tuple<Tensor, Tensor, Tensor, Tensor> select(
    Tensor features, Tensor mu, Tensor uniforms, std::optional<Tensor> base_log_w) {
    check_select(Rule::kName, Rule::kDrawDims, features, mu, uniforms, base_log_w);
    const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
    const bool several = uniforms.dim() == 2 + Rule::kDrawDims;
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

    GroupLaunch groups(features, shape.G, shape.M, Rule::scratch(shape.M));
    with_base(features, base_log_w, [&](auto feature, auto base) {
        using Feature = decltype(feature);
        using Base = decltype(base);
        const Feature* const f = features.const_data_ptr<Feature>();
        const double *const m = mu.const_data_ptr<double>(), *const u = uniforms.const_data_ptr<double>();
        const Base* const b = base_log_w ? base_log_w->const_data_ptr<Base>() : nullptr;
        int64_t* const i = index.mutable_data_ptr<int64_t>();
        Feature* const w = weights.mutable_data_ptr<Feature>();
        Feature* const z = log_z.mutable_data_ptr<Feature>();
        Feature* const e = ess.mutable_data_ptr<Feature>();
        if (shape.M <= kWarp) {
            launch(
                Rule::kName, features, select_few_kernel<Rule, Feature, Base>, (shape.G + kFewWarps - 1) / kFewWarps,
                kFewThreads, 0, f, m, b, u, shape, i, w, z, e);
            return;
        }
        groups.dispatch([&](auto threads, auto shared) {
            launch(
                Rule::kName, features, select_kernel<Rule, Feature, Base, threads.value, shared.value>, groups.blocks,
                threads.value, groups.shared_bytes, f, m, b, u, shape, groups.scratch(), i, w, z, e);
        });
    });
    return {index, weights, log_z, ess};
}

}  // namespace daemon_fast::cuda
