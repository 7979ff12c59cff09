// importance_weights on the CPU: normalised weights, log mean and effective sample size of each row.
#include "cpu/groups.h"

namespace daemon_fast::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor> importance_weights(Tensor log_w) {
    check_importance_weights(log_w);
    const int64_t G = log_w.size(0), M = log_w.size(1);
    const ScalarType type = log_w.scalar_type();
    log_w = torch::stable::contiguous(log_w);
    Tensor weights = empty_like_with(log_w, {G, M}, type);
    Tensor log_mean = empty_like_with(log_w, {G}, type);
    Tensor ess = empty_like_with(log_w, {G}, type);
    const auto run = [&](auto real) {
        using Real = decltype(real);
        Groups<Real, Real> groups{G, M};
        groups.base = log_w.const_data_ptr<Real>();
        groups.weights = weights.mutable_data_ptr<Real>();
        groups.log_mean = log_mean.mutable_data_ptr<Real>();
        groups.ess = ess.mutable_data_ptr<Real>();
        weigh_and_draw<Sir>("importance_weights", groups);
    };
    type == ScalarType::Double ? run(double{}) : run(float{});
    return {weights, log_mean, ess};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(daemon_fast, m) {
    m.def("importance_weights(Tensor log_w) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(daemon_fast, CPU, m) {
    m.impl("importance_weights", TORCH_BOX(&importance_weights));
}

}  // namespace daemon_fast::cpu
