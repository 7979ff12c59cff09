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
        write_group<kThreads>(w, M, sums, weights + g * M, log_mean + g, ess + g);
    }
}

}  // namespace daemon_fast::cuda
