// Device side of sir_select: one group of candidates a block, from features to draws in one launch.
#pragma once

#include "cuda/weights.cuh"

namespace daemon_fast::cuda {

struct SelectShape {
    int64_t G, M, K, S;
};

// cumulative[j] = w[0] + ... + w[j]. The order of summation differs from the CPU's, by rounding in the last digit.
template <int kThreads>
__device__ void accumulate(
    const double* w, int64_t M, double* cumulative, typename cub::BlockScan<double, kThreads>::TempStorage& storage) {
    double before = 0;
    for (int64_t begin = 0; begin < M; begin += kThreads) {
        const int64_t j = begin + threadIdx.x;
        double sum, total;
        cub::BlockScan<double, kThreads>(storage).InclusiveSum(j < M ? w[j] : 0.0, sum, total);
        if (j < M) cumulative[j] = before + sum;
        before += total;
        __syncthreads();  // the next scan overwrites the storage; behind the last, all sums are written
    }
}

// Inverse CDF, by one warp: the first j whose cumulative weight exceeds uniform * total. A candidate of weight 0 is
// never drawn, though rounding may make the cumulative weights of a parallel sum dip or rise at it.
__device__ __forceinline__ int64_t draw(const double* w, const double* cumulative, int64_t M, double uniform) {
    const double threshold = uniform * cumulative[M - 1];
    const int lane = threadIdx.x % kWarp;
    int64_t last = -1;
    for (int64_t begin = 0; begin < M; begin += kWarp) {
        const int64_t j = begin + lane;
        const bool possible = j < M && w[j] > 0;
        const uint32_t above = __ballot_sync(kAllLanes, possible && cumulative[j] > threshold);
        if (above) return begin + __popc((above & (~above + 1)) - 1);  // the lowest bit set
        const uint32_t any = __ballot_sync(kAllLanes, possible);
        if (any) last = begin + (kWarp - 1 - __clz(any));
    }
    return last;  // rounding lifted the threshold to the total
}

// index is -1, and all else NaN, for a group without weights; -1 also for a uniform outside [0, 1).
template <class Feature, class Base, int kThreads, bool kShared>
__global__ void __launch_bounds__(kThreads, 1) sir_select_kernel(
    const Feature* features, const double* mu, const Base* base, const double* uniforms, SelectShape shape,
    double* global_scratch, int64_t* index, Feature* weights, Feature* log_z, Feature* ess) {
    __shared__ typename Reduction<kThreads>::Storage reduce_storage;
    __shared__ typename cub::BlockScan<double, kThreads>::TempStorage scan_storage;
    const int64_t M = shape.M, K = shape.K, S = shape.S;
    double* const w = group_scratch<kShared>(global_scratch, 2 * M);
    double* const cumulative = w + M;
    for (int64_t g = blockIdx.x; g < shape.G; g += gridDim.x) {
        for (int64_t j = threadIdx.x; j < M; j += kThreads) {
            const Feature* const f = features + (g * M + j) * K;
            double energy = 0;
            for (int64_t k = 0; k < K; ++k) energy += mu[k] * static_cast<double>(f[k]);
            w[j] = (base ? static_cast<double>(base[g * M + j]) : 0.0) - energy;
        }
        const WeightSums sums = exponentiate<kThreads>(w, M, reduce_storage);
        const bool valid = write_group<kThreads>(w, M, sums, weights + g * M, log_z + g, ess + g);
        if (valid) accumulate<kThreads>(w, M, cumulative, scan_storage);
        for (int64_t s = threadIdx.x / kWarp; s < S; s += kThreads / kWarp) {
            const double uniform = uniforms[g * S + s];
            const int64_t drawn = valid && uniform >= 0 && uniform < 1 ? draw(w, cumulative, M, uniform) : -1;
            if (threadIdx.x % kWarp == 0) index[g * S + s] = drawn;
        }
        __syncthreads();  // the next group overwrites the weights
    }
}

}  // namespace daemon_fast::cuda
