// Device side of sir_select and race_select: one group of candidates a block, or a warp where they are few, from
// features to draws in one launch. The two differ by the rule that draws. A rule's `prepare` is run by the whole block,
// its `draw` by one warp per draw; `draw_few` has a weight a lane, and its uniform.
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
            if (above) return begin + lowest_bit(above);
            const uint32_t any = __ballot_sync(kAllLanes, possible);
            if (any) last = begin + (kWarp - 1 - __clz(any));
        }
        return last;  // rounding lifted the threshold to the total
    }

    static __device__ int lane_uniform(int, int) { return 0; }
    static __device__ __forceinline__ int draw_few(double w, bool, double uniform) {
        if (!(uniform >= 0 && uniform < 1)) return -1;
        const double running = running_sums(w);
        return pick(w, running, uniform * last_lane(running)).lane;
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

    static __device__ int lane_uniform(int lane, int M) { return lane < M ? lane : 0; }
    static __device__ __forceinline__ int draw_few(double w, bool candidate, double uniform) {
        if (__ballot_sync(kAllLanes, candidate && !(uniform >= 0 && uniform < 1))) return -1;
        const double arrival = w > 0 ? uniform / w : -minus_infinity();
        return lowest_bit(__ballot_sync(kAllLanes, arrival == -reduce_max(-arrival)));
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

constexpr int kFewThreads = 128;
constexpr int kFewWarps = kFewThreads / kWarp;

// The same for M <= 32: a warp a group and a lane a candidate, all in registers.
template <class Rule, class Feature, class Base>
__global__ void __launch_bounds__(kFewThreads) select_few_kernel(
    const Feature* features, const double* mu, const Base* base, const double* uniforms, SelectShape shape,
    int64_t* index, Feature* weights, Feature* log_z, Feature* ess) {
    const int lane = threadIdx.x % kWarp, M = static_cast<int>(shape.M), K = static_cast<int>(shape.K);
    const bool candidate = lane < M;
    for (int64_t g = int64_t{blockIdx.x} * kFewWarps + threadIdx.x / kWarp; g < shape.G;
         g += int64_t{gridDim.x} * kFewWarps) {
        const int64_t of_draw = Rule::uniforms(M), j = g * M + lane;
        const double* const own_uniforms = uniforms + g * shape.S * of_draw + Rule::lane_uniform(lane, M);
        const auto uniform_of = [&](int64_t s) { return s < shape.S ? own_uniforms[s * of_draw] : 0.0; };
        double uniform = uniform_of(0), log_w = minus_infinity();  // loaded before it is needed
        if (candidate) {
            const Feature* const f = features + j * K;
            double energy = 0;
#pragma unroll 4
            for (int k = 0; k < K; ++k) energy += mu[k] * static_cast<double>(f[k]);
            log_w = (base ? static_cast<double>(base[j]) : 0.0) - energy;
        }
        const double max = reduce_max(log_w);
        const bool valid = is_finite(max);
        const double w = exp(log_w - max);  // 0 where there is no candidate
        double sum = w, sum_of_squares = w * w;
#pragma unroll
        for (int distance = 1; distance < kWarp; distance *= 2) {
            sum += __shfl_xor_sync(kAllLanes, sum, distance);
            sum_of_squares += __shfl_xor_sync(kAllLanes, sum_of_squares, distance);
        }
        if (candidate) weights[j] = static_cast<Feature>(valid ? w / sum : nan_double());
        // Lane 0 divides for log_z what the others divide for ess.
        const double quotient = (lane ? sum * sum : sum) / (lane ? sum_of_squares : static_cast<double>(M));
        if (lane == 0) log_z[g] = static_cast<Feature>(valid ? max + log(quotient) : nan_double());
        if (lane == 1) ess[g] = static_cast<Feature>(valid ? quotient : nan_double());
        for (int64_t s = 0; s < shape.S; ++s) {
            const double next = uniform_of(s + 1);
            const int drawn = valid ? Rule::draw_few(w, candidate, uniform) : -1;
            if (lane == 0) index[g * shape.S + s] = drawn;
            uniform = next;
        }
    }
}

}  // namespace daemon_fast::cuda
