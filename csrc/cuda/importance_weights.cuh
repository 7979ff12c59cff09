// Device side of importance_weights: one row of log-weights a block. A row without weights becomes NaN.
#pragma once

#include "cuda/weights.cuh"

namespace daemon_fast::cuda {

template <class Weight, int kThreads, bool kShared>
__global__ void __launch_bounds__(kThreads, 1) importance_weights_kernel(
    const Weight* log_w, int64_t G, int64_t M, double* global_scratch, Weight* weights, Weight* log_mean, Weight* ess) {
    __shared__ typename Reduction<kThreads>::Storage storage;
    double* const w = group_scratch<kShared>(global_scratch, M);
    for (int64_t g = blockIdx.x; g < G; g += gridDim.x) {
        for (int64_t j = threadIdx.x; j < M; j += kThreads) w[j] = static_cast<double>(log_w[g * M + j]);
        const WeightSums sums = exponentiate<kThreads>(w, M, storage);
        const bool valid = is_finite(sums.max);
        for (int64_t j = threadIdx.x; j < M; j += kThreads)
            weights[g * M + j] = static_cast<Weight>(valid ? w[j] / sums.sum : nan_double());
        if (threadIdx.x == 0) {
            log_mean[g] = static_cast<Weight>(valid ? sums.max + log(sums.sum / static_cast<double>(M)) : nan_double());
            ess[g] = static_cast<Weight>(valid ? sums.sum * sums.sum / sums.sum_of_squares : nan_double());
        }
    }
}

}  // namespace daemon_fast::cuda
