// The body of importance_weights, sir_select and race_select: tilt, weigh and draw, one group of candidates at a time.
// The first has no features (K = 0) and no draws (S = 0); the other two differ by the rule that draws.
#pragma once

#include "cpu/weights.h"

namespace daemon_fast::cpu {

template <class Real, class Base>
struct Groups {
    int64_t G, M, K = 0, S = 0;
    const Real* features = nullptr;    // [G, M, K]
    const double* mu = nullptr;        // [K]
    const double* uniforms = nullptr;  // [G, S, Rule::uniforms(M)]
    const Base* base = nullptr;        // [G, M], or null
    int64_t* index = nullptr;          // [G, S]
    Real* weights = nullptr;           // [G, M]
    Real* log_mean = nullptr;          // [G]
    Real* ess = nullptr;               // [G]

    DAEMON_FAST_INLINE void log_weights(int64_t g, double* log_w) const {
        tilt(features + g * M * K, mu, base ? base + g * M : nullptr, M, K, log_w);
    }
};

// Inverse CDF: the first j whose cumulative weight exceeds uniform * total. A candidate of weight 0 is never drawn.
struct Sir {
    static constexpr const char* kName = "sir_select";
    static constexpr int64_t kDrawDims = 0;
    static constexpr int64_t uniforms(int64_t) { return 1; }

    static DAEMON_FAST_INLINE int64_t draw(const double* weights, int64_t M, const double* uniform) {
        double total = 0;
        for (int64_t j = 0; j < M; ++j) total += weights[j];
        const double threshold = *uniform * total;
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
};

// A race: candidate j arrives at uniform_j / weight_j, and the first to arrive is drawn; of several at once, the one of
// lowest index. A candidate of weight 0 never arrives.
struct Race {
    static constexpr const char* kName = "race_select";
    static constexpr int64_t kDrawDims = 1;
    static constexpr int64_t uniforms(int64_t M) { return M; }

    static DAEMON_FAST_INLINE int64_t draw(const double* weights, int64_t M, const double* uniforms) {
        double first = kInf;
        int64_t winner = 0;
        for (int64_t j = 0; j < M; ++j) {
            const double arrival = weights[j] > 0 ? uniforms[j] / weights[j] : kInf;
            winner = arrival < first ? j : winner;
            first = arrival < first ? arrival : first;
        }
        return winner;
    }
};

// An error, in the name of `op`, if a group has no weights.
template <class Rule, class Real, class Base>
void weigh_and_draw(const char* op, Groups<Real, Base> groups) {
    const int64_t G = groups.G, M = groups.M, S = groups.S;
    if (G == 0) return;
    FirstBadRow bad;
    const int64_t grain = std::max<int64_t>(1, 4096 / (M * std::max<int64_t>(1, groups.K)));
    torch::stable::parallel_for(0, G, grain, [&](int64_t begin, int64_t end) {
        std::vector<double> w(static_cast<size_t>(padded(M)));
        dispatch([&]() DAEMON_FAST_INLINE_LAMBDA {
            const auto p = groups;  // a copy, which writing the results can't change
            for (int64_t g = begin; g < end; ++g) {
                p.log_weights(g, w.data());
                const WeightSums sums = exponentiate(w.data(), M);
                if (!std::isfinite(sums.max)) {
                    bad.report(g);
                    continue;
                }
                const double scale = 1.0 / sums.sum;
                for (int64_t j = 0; j < M; ++j) p.weights[g * M + j] = static_cast<Real>(w[j] * scale);
                p.log_mean[g] = static_cast<Real>(sums.max + std::log(sums.sum / static_cast<double>(M)));
                p.ess[g] = static_cast<Real>(sums.sum * sums.sum / sums.sum_of_squares);
                for (int64_t s = 0; s < S; ++s)
                    p.index[g * S + s] = Rule::draw(w.data(), M, p.uniforms + (g * S + s) * Rule::uniforms(M));
            }
        });
    });
    if (!bad.any()) return;
    std::vector<double> w(static_cast<size_t>(padded(M)));
    groups.log_weights(bad.row(), w.data());
    fail_log_weights(op, bad.row(), w.data(), M);
}

}  // namespace daemon_fast::cpu
