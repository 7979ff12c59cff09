// The CPU side of sir_select and race_select, from tensors to tensors: they differ by the rule that draws.
#pragma once

#include "cpu/groups.h"

namespace daemon_fast::cpu {

template <class Rule>
std::tuple<Tensor, Tensor, Tensor, Tensor> select(
    Tensor features, Tensor mu, Tensor uniforms, std::optional<Tensor> base_log_w) {
    check_select(Rule::kName, Rule::kDrawDims, features, mu, uniforms, base_log_w);
    const bool several = uniforms.dim() == 2 + Rule::kDrawDims;
    const int64_t G = features.size(0), M = features.size(1), K = features.size(2);
    const int64_t S = several ? uniforms.size(1) : 1;
    const ScalarType type = features.scalar_type();
    features = torch::stable::contiguous(features);
    mu = torch::stable::contiguous(mu);
    uniforms = torch::stable::contiguous(uniforms);
    if (base_log_w) base_log_w = torch::stable::contiguous(*base_log_w);
    const double* const uniform_of = uniforms.const_data_ptr<double>();
    const int64_t of_row = S * Rule::uniforms(M);
    for (int64_t i = 0; i < G * of_row; ++i)
        if (!(uniform_of[i] >= 0 && uniform_of[i] < 1))
            fail(Rule::kName, ": uniforms of row ", i / of_row, " hold ", uniform_of[i], ", which is not in [0, 1)");

    Tensor index =
        empty_like_with(features, several ? std::vector<int64_t>{G, S} : std::vector<int64_t>{G}, ScalarType::Long);
    Tensor weights = empty_like_with(features, {G, M}, type);
    Tensor log_z = empty_like_with(features, {G}, type);
    Tensor ess = empty_like_with(features, {G}, type);
    with_base(features, base_log_w, [&](auto feature, auto base) {
        using Feature = decltype(feature);
        using Base = decltype(base);
        Groups<Feature, Base> groups{G, M, K, S};
        groups.features = features.const_data_ptr<Feature>();
        groups.mu = mu.const_data_ptr<double>();
        groups.uniforms = uniform_of;
        if (base_log_w) groups.base = base_log_w->const_data_ptr<Base>();
        groups.index = index.mutable_data_ptr<int64_t>();
        groups.weights = weights.mutable_data_ptr<Feature>();
        groups.log_mean = log_z.mutable_data_ptr<Feature>();
        groups.ess = ess.mutable_data_ptr<Feature>();
        weigh_and_draw<Rule>(Rule::kName, groups);
    });
    return {index, weights, log_z, ess};
}

}  // namespace daemon_fast::cpu
