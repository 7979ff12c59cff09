// Importance weights of one group of candidates, in float64: what importance_weights, sir_select and
// tilted_moments share.
#pragma once

#include <atomic>
#include <vector>

#include "checks.h"
#include "cpu/vec.h"

namespace daemon_fast::cpu {

DAEMON_FAST_INLINE int64_t padded(int64_t size) {
    return (size + kLanes - 1) / kLanes * kLanes;
}

struct WeightSums {
    double max;  // of the log-weights; not finite: the group has no weights
    double sum;  // of exp(log w - max)
    double sum_of_squares;
};

// log_w[padded(M)] becomes exp(log_w - max), with zeros behind M. NaN, +inf and all -inf come back in `max`.
DAEMON_FAST_INLINE WeightSums exponentiate(double* log_w, int64_t M) {
    const int64_t end = padded(M);
    for (int64_t j = M; j < end; ++j) log_w[j] = -kInf;
    Vec max = splat(-kInf), poison = Vec{};
    for (int64_t j = 0; j < end; j += kLanes) {
        const Vec x = load_vec(log_w + j);
        max = x > max ? x : max;
        poison = x == x ? poison : x;  // NaN hides from every comparison
    }
    WeightSums sums{-kInf, 0, 0};
    for (int64_t lane = 0; lane < kLanes; ++lane) {
        if (max[lane] > sums.max) sums.max = max[lane];
        if (std::isnan(poison[lane])) sums.max = poison[lane];
        if (std::isnan(sums.max)) break;
    }
    if (!std::isfinite(sums.max)) return sums;
    Vec sum = Vec{}, squares = Vec{};
    for (int64_t j = 0; j < end; j += kLanes) {
        const Vec w = exp_nonpositive<13>(load_vec(log_w + j) - sums.max);
        store_vec(log_w + j, w);
        sum += w;
        squares += w * w;
    }
    sums.sum = sum_lanes(sum);
    sums.sum_of_squares = sum_lanes(squares);
    return sums;
}

// log_w[M] = base, or zeros without one. Not a conditional in the caller's loop: GCC would turn that into masked loads
// from a null pointer, each a microcode assist, eight times slower than all the rest.
template <class Base>
DAEMON_FAST_INLINE void start_log_weights(const Base* base, int64_t M, double* log_w) {
    if (!base) {
        std::memset(log_w, 0, sizeof(double) * static_cast<size_t>(M));
        return;
    }
    for (int64_t j = 0; j < M; ++j) log_w[j] = static_cast<double>(base[j]);
}

// log w_j = base_j - mu . f_j for one group. base may be null.
template <class Feature, class Base>
DAEMON_FAST_INLINE void tilt(
    const Feature* features, const double* mu, const Base* base, int64_t M, int64_t K, double* log_w) {
    start_log_weights(base, M, log_w);
    if (K == 0) return;
    for (int64_t j = 0; j < M; ++j) {
        double energy = 0;
        for (int64_t k = 0; k < K; ++k) energy += mu[k] * static_cast<double>(features[j * K + k]);
        log_w[j] -= energy;
    }
}

// The lowest row at which any thread failed: the error must not depend on the number of threads.
class FirstBadRow {
 public:
    void report(int64_t row) {
        int64_t lowest = row_.load(std::memory_order_relaxed);
        while (row < lowest && !row_.compare_exchange_weak(lowest, row)) {
        }
    }
    bool any() const { return row() != std::numeric_limits<int64_t>::max(); }
    int64_t row() const { return row_.load(); }

 private:
    std::atomic<int64_t> row_{std::numeric_limits<int64_t>::max()};
};

// Says why a group of log-weights has no weights: called off the hot path, once a group was found bad.
[[noreturn]] inline void fail_log_weights(const char* op, int64_t row, const double* log_w, int64_t M) {
    for (int64_t j = 0; j < M; ++j)
        if (std::isnan(log_w[j]) || log_w[j] == kInf)
            fail(op, ": log-weight of row ", row, ", candidate ", j, " is ", log_w[j]);
    fail(op, ": all ", M, " log-weights of row ", row, " are -inf");
}

// A contiguous float64 copy of `tensor`, or itself.
inline Tensor as_double(const Tensor& tensor) {
    return torch::stable::contiguous(
        tensor.scalar_type() == ScalarType::Double ? tensor : torch::stable::to(tensor, ScalarType::Double));
}

}  // namespace daemon_fast::cpu
