// importance_weights on the CPU: normalised weights, log mean and effective sample size of each row.
#include "checks.h"
#include "cpu/dispatch.h"
#include "cpu/weights.h"

namespace daemon_fast::cpu {
namespace {

template <class Real>
void weigh_rows(const Tensor& log_w, Tensor& weights, Tensor& log_mean, Tensor& ess) {
    const int64_t G = log_w.size(0), M = log_w.size(1);
    const Real* const in = log_w.const_data_ptr<Real>();
    Real* const weight_of = weights.mutable_data_ptr<Real>();
    Real* const log_mean_of = log_mean.mutable_data_ptr<Real>();
    Real* const ess_of = ess.mutable_data_ptr<Real>();
    FirstBadRow bad;
    const int64_t grain = std::max<int64_t>(1, 4096 / M);
    torch::stable::parallel_for(0, G, grain, [&](int64_t begin, int64_t end) {
        std::vector<double> w(static_cast<size_t>(padded(M)));
        dispatch([&]() DAEMON_FAST_INLINE_LAMBDA {
            for (int64_t g = begin; g < end; ++g) {
                for (int64_t j = 0; j < M; ++j) w[j] = static_cast<double>(in[g * M + j]);
                const WeightSums sums = exponentiate(w.data(), M);
                if (!std::isfinite(sums.max)) {
                    bad.report(g);
                    continue;
                }
                const double scale = 1.0 / sums.sum;
                for (int64_t j = 0; j < M; ++j) weight_of[g * M + j] = static_cast<Real>(w[j] * scale);
                log_mean_of[g] = static_cast<Real>(sums.max + std::log(sums.sum / static_cast<double>(M)));
                ess_of[g] = static_cast<Real>(sums.sum * sums.sum / sums.sum_of_squares);
            }
        });
    });
    if (bad.any()) {
        const std::vector<double> row(in + bad.row() * M, in + (bad.row() + 1) * M);
        fail_log_weights("importance_weights", bad.row(), row.data(), M);
    }
}

std::tuple<Tensor, Tensor, Tensor> importance_weights(Tensor log_w) {
    check_importance_weights(log_w);
    const int64_t G = log_w.size(0);
    const ScalarType type = log_w.scalar_type();
    log_w = torch::stable::contiguous(log_w);
    Tensor weights = empty_like_with(log_w, {G, log_w.size(1)}, type);
    Tensor log_mean = empty_like_with(log_w, {G}, type);
    Tensor ess = empty_like_with(log_w, {G}, type);
    if (G > 0) {
        if (type == ScalarType::Double)
            weigh_rows<double>(log_w, weights, log_mean, ess);
        else
            weigh_rows<float>(log_w, weights, log_mean, ess);
    }
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
