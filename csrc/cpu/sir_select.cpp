// sir_select on the CPU: tilt, weigh and draw, one group of candidates at a time.
#include "checks.h"
#include "cpu/dispatch.h"
#include "cpu/weights.h"

namespace daemon_fast::cpu {
namespace {

// Inverse CDF: the first j whose cumulative weight exceeds uniform * total. A candidate of weight 0 is never drawn.
DAEMON_FAST_INLINE int64_t draw(const double* weights, int64_t M, double uniform) {
    double total = 0;
    for (int64_t j = 0; j < M; ++j) total += weights[j];
    const double threshold = uniform * total;
    double cumulative = 0;
    int64_t last = 0;
    for (int64_t j = 0; j < M; ++j) {
        if (weights[j] == 0) continue;
        cumulative += weights[j];
        last = j;
        if (cumulative > threshold) break;
    }
    return last;  // also where rounding lifted the threshold to the total
}

template <class Real>
void select_groups(
    const Tensor& features, const Tensor& mu, const Tensor& uniforms, const std::optional<Tensor>& base, Tensor& index,
    Tensor& weights, Tensor& log_z, Tensor& ess) {
    const int64_t G = features.size(0), M = features.size(1), K = features.size(2);
    const int64_t S = uniforms.dim() == 2 ? uniforms.size(1) : 1;
    const Real* const feature_of = features.const_data_ptr<Real>();
    const double* const mu_of = mu.const_data_ptr<double>();
    const double* const base_of = base ? base->const_data_ptr<double>() : nullptr;
    const double* const uniform_of = uniforms.const_data_ptr<double>();
    int64_t* const index_of = index.mutable_data_ptr<int64_t>();
    Real* const weight_of = weights.mutable_data_ptr<Real>();
    Real* const log_z_of = log_z.mutable_data_ptr<Real>();
    Real* const ess_of = ess.mutable_data_ptr<Real>();
    FirstBadRow bad;
    const int64_t grain = std::max<int64_t>(1, 4096 / (M * std::max<int64_t>(1, K)));
    torch::stable::parallel_for(0, G, grain, [&](int64_t begin, int64_t end) {
        std::vector<double> w(static_cast<size_t>(padded(M)));
        dispatch([&]() DAEMON_FAST_INLINE_LAMBDA {
            for (int64_t g = begin; g < end; ++g) {
                tilt(feature_of + g * M * K, mu_of, base_of ? base_of + g * M : nullptr, M, K, w.data());
                const WeightSums sums = exponentiate(w.data(), M);
                if (!std::isfinite(sums.max)) {
                    bad.report(g);
                    continue;
                }
                const double scale = 1.0 / sums.sum;
                for (int64_t j = 0; j < M; ++j) weight_of[g * M + j] = static_cast<Real>(w[j] * scale);
                log_z_of[g] = static_cast<Real>(sums.max + std::log(sums.sum / static_cast<double>(M)));
                ess_of[g] = static_cast<Real>(sums.sum * sums.sum / sums.sum_of_squares);
                for (int64_t s = 0; s < S; ++s) index_of[g * S + s] = draw(w.data(), M, uniform_of[g * S + s]);
            }
        });
    });
    if (bad.any()) {
        std::vector<double> w(static_cast<size_t>(padded(M)));
        tilt(feature_of + bad.row() * M * K, mu_of, base_of ? base_of + bad.row() * M : nullptr, M, K, w.data());
        fail_log_weights("sir_select", bad.row(), w.data(), M);
    }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sir_select(
    Tensor features, Tensor mu, Tensor uniforms, std::optional<Tensor> base_log_w) {
    check_sir_select(features, mu, uniforms, base_log_w);
    const int64_t G = features.size(0), M = features.size(1);
    const ScalarType type = features.scalar_type();
    features = torch::stable::contiguous(features);
    mu = torch::stable::contiguous(mu);
    uniforms = torch::stable::contiguous(uniforms);
    if (base_log_w) base_log_w = as_double(*base_log_w);
    const double* const uniform = uniforms.const_data_ptr<double>();
    for (int64_t i = 0; i < uniforms.numel(); ++i)
        if (!(uniform[i] >= 0 && uniform[i] < 1))
            fail(
                "sir_select: uniforms of row ", i / (uniforms.numel() / G), " hold ", uniform[i],
                ", which is not in [0, 1)");

    std::vector<int64_t> draws =
        uniforms.dim() == 2 ? std::vector<int64_t>{G, uniforms.size(1)} : std::vector<int64_t>{G};
    Tensor index = empty_like_with(features, draws, ScalarType::Long);
    Tensor weights = empty_like_with(features, {G, M}, type);
    Tensor log_z = empty_like_with(features, {G}, type);
    Tensor ess = empty_like_with(features, {G}, type);
    if (G > 0) {
        if (type == ScalarType::Double)
            select_groups<double>(features, mu, uniforms, base_log_w, index, weights, log_z, ess);
        else
            select_groups<float>(features, mu, uniforms, base_log_w, index, weights, log_z, ess);
    }
    return {index, weights, log_z, ess};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(daemon_fast, m) {
    m.def(
        "sir_select(Tensor features, Tensor mu, Tensor uniforms, Tensor? base_log_w=None) -> "
        "(Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(daemon_fast, CPU, m) {
    m.impl("sir_select", TORCH_BOX(&sir_select));
}

}  // namespace daemon_fast::cpu
