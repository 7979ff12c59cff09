// Importance weights of one group of candidates by one block: what importance_weights and sir_select share.
#pragma once

#include "cuda/device.cuh"

namespace daemon_fast::cuda {

struct WeightSums {
    double max;  // of the log-weights; not finite: the group has no weights
    double sum;  // of exp(log w - max)
    double sum_of_squares;
};

// log_w[M] becomes exp(log_w - max). Each thread reads and writes only its own j = threadIdx.x + i * kThreads, so that
// no barrier is needed before or after; all get the sums. NaN, +inf and all -inf come back in `max`.
template <int kThreads>
__device__ WeightSums exponentiate(double* log_w, int64_t M, typename Reduction<kThreads>::Storage& storage) {
    Reduction<kThreads> reduce(storage);
    WeightSums sums{minus_infinity(), 0, 0};
    for (int64_t j = threadIdx.x; j < M; j += kThreads) sums.max = MaxOrNan()(sums.max, log_w[j]);
    sums.max = reduce(sums.max, MaxOrNan());
    if (!is_finite(sums.max)) return sums;
    for (int64_t j = threadIdx.x; j < M; j += kThreads) {
        const double w = exp(log_w[j] - sums.max);
        log_w[j] = w;
        sums.sum += w;
        sums.sum_of_squares += w * w;
    }
    sums.sum = reduce(sums.sum, Sum());
    sums.sum_of_squares = reduce(sums.sum_of_squares, Sum());
    return sums;
}

// Writes the results of one group, all NaN if it has no weights; returns whether it has.
template <int kThreads, class Real>
__device__ bool write_group(
    const double* w, int64_t M, const WeightSums& sums, Real* weights, Real* log_mean, Real* ess) {
    const bool valid = is_finite(sums.max);
    for (int64_t j = threadIdx.x; j < M; j += kThreads)
        weights[j] = static_cast<Real>(valid ? w[j] / sums.sum : nan_double());
    if (threadIdx.x == 0) {
        *log_mean = static_cast<Real>(valid ? sums.max + log(sums.sum / static_cast<double>(M)) : nan_double());
        *ess = static_cast<Real>(valid ? sums.sum * sums.sum / sums.sum_of_squares : nan_double());
    }
    return valid;
}

// The block's scratch of `doubles`, in shared memory, or in global memory where they don't fit. kShared is a constant
// so that the compiler knows the address space of every access.
template <bool kShared>
__device__ __forceinline__ double* group_scratch(double* global, int64_t doubles) {
    return kShared ? reinterpret_cast<double*>(dynamic_shared()) : global + blockIdx.x * doubles;
}

}  // namespace daemon_fast::cuda
