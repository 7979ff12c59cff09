// Device side of sir_select and race_select: one group of candidates a block, from features to draws in one launch. The
// two differ by the rule that draws. A rule's `prepare` is run by the whole block, its `draw` by one warp per draw.
#pragma once

#include "cuda/weights.cuh"

namespace daemon_fast::cuda {

struct SelectShape {
    int64_t G, M, K, S;
};

// Inverse CDF: the first j whose cumulative weight exceeds uniform * total. A candidate of weight 0 is never drawn,
// though rounding may make the cumulative weights of a parallel sum dip or rise at it.
struct Sir {
    static constexpr const char* kName = "sir_select";
    static constexpr int64_t kDrawDims = 0;
    static __host__ __device__ constexpr int64_t scratch(int64_t M) { return 2 * M; }
    static __device__ int64_t uniforms(int64_t) { return 1; }

    template <int kThreads>
    using Storage = typename cub::BlockScan<double, kThreads>::TempStorage;

    // w[M + j] = w[0] + ... + w[j]. The order of summation differs from the CPU's, by rounding in the last digit.
    template <int kThreads>
    static __device__ void prepare(double* w, int64_t M, Storage<kThreads>& storage) {
        double before = 0;
        for (int64_t begin = 0; begin < M; begin += kThreads) {
            const int64_t j = begin + threadIdx.x;
            double sum, total;
            cub::BlockScan<double, kThreads>(storage).InclusiveSum(j < M ? w[j] : 0.0, sum, total);
            if (j < M) w[M + j] = before + sum;
            before += total;
            __syncthreads();  // the next scan overwrites the storage; behind the last, all sums are written
        }
    }

    static __device__ __forceinline__ int64_t draw(const double* w, int64_t M, const double* uniforms) {
        const double uniform = *uniforms;
        if (!(uniform >= 0 && uniform < 1)) return -1;
        const double* const cumulative = w + M;
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
};

// A race: candidate j arrives at uniform_j / weight_j, and the first to arrive is drawn; of several at once, the one of
// lowest index. A candidate of weight 0 never arrives.
struct Race {
    static constexpr const char* kName = "race_select";
    static constexpr int64_t kDrawDims = 1;
    static __host__ __device__ constexpr int64_t scratch(int64_t M) { return M; }
    static __device__ int64_t uniforms(int64_t M) { return M; }

    template <int kThreads>
    struct Storage {};

    template <int kThreads>
    static __device__ void prepare(const double*, int64_t, Storage<kThreads>&) {
        __syncthreads();  // all weights are written
    }

    static __device__ __forceinline__ int64_t draw(const double* w, int64_t M, const double* uniforms) {
        bool bad = false;
        double first = -minus_infinity(), winner = 0;  // an index is exact as a double
        for (int64_t j = threadIdx.x % kWarp; j < M; j += kWarp) {
            bad |= !(uniforms[j] >= 0 && uniforms[j] < 1);
            const double arrival = w[j] > 0 ? uniforms[j] / w[j] : -minus_infinity();
            if (arrival < first) {
                first = arrival;
                winner = static_cast<double>(j);
            }
        }
        if (__ballot_sync(kAllLanes, bad)) return -1;
        const double first_of_all = reduce_warp(first, Min());
        return static_cast<int64_t>(reduce_warp(first == first_of_all ? winner : static_cast<double>(M), Min()));
    }
};

// index is -1, and all else NaN, for a group without weights; -1 also for a uniform outside [0, 1).
template <class Rule, class Feature, class Base, int kThreads, bool kShared>
__global__ void __launch_bounds__(kThreads, 1) select_kernel(
    const Feature* features, const double* mu, const Base* base, const double* uniforms, SelectShape shape,
    double* global_scratch, int64_t* index, Feature* weights, Feature* log_z, Feature* ess) {
    __shared__ typename Reduction<kThreads>::Storage reduce_storage;
    __shared__ typename Rule::template Storage<kThreads> rule_storage;
    const int64_t M = shape.M, K = shape.K, S = shape.S;
    double* const w = group_scratch<kShared>(global_scratch, Rule::scratch(M));
    for (int64_t g = blockIdx.x; g < shape.G; g += gridDim.x) {
        for (int64_t j = threadIdx.x; j < M; j += kThreads) {
            const Feature* const f = features + (g * M + j) * K;
            double energy = 0;
            for (int64_t k = 0; k < K; ++k) energy += mu[k] * static_cast<double>(f[k]);
            w[j] = (base ? static_cast<double>(base[g * M + j]) : 0.0) - energy;
        }
        const WeightSums sums = exponentiate<kThreads>(w, M, reduce_storage);
        const bool valid = write_group<kThreads>(w, M, sums, weights + g * M, log_z + g, ess + g);
        if (valid) Rule::template prepare<kThreads>(w, M, rule_storage);
        for (int64_t s = threadIdx.x / kWarp; s < S; s += kThreads / kWarp) {
            const int64_t drawn = valid ? Rule::draw(w, M, uniforms + (g * S + s) * Rule::uniforms(M)) : -1;
            if (threadIdx.x % kWarp == 0) index[g * S + s] = drawn;
        }
        __syncthreads();  // the next group overwrites the weights
    }
}

}  // namespace daemon_fast::cuda
