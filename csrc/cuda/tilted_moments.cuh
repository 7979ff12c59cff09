// Device side of tilted_moments: log Z, mean and covariance of the features under weights exp(b - mu . f), in float64.
//
// Each warp takes 32 samples at a time: log-weights, their maximum, weights, mean, and outer products about that mean,
// so that no large numbers cancel. Chunks of one set of samples are merged by Chan's update. A set is one prefix, or,
// with global weights, all that the warp sees. Warps, then blocks, are combined in a fixed order, over a grid that does
// not depend on the GPU: the result is the same on every run and every device.
#pragma once

#include "cuda/device.cuh"

namespace daemon_fast::cuda {

constexpr int64_t kMaxMomentBlocks = 264;  // two for each multiprocessor of an H100 or H200
constexpr int kMaxMomentWarps = 8;
constexpr int64_t kMomentSharedBytes = 48 * 1024;  // what every device grants a block without asking

struct MomentShape {
    int64_t N, M;
    int K;
    bool per_prefix;

    __host__ __device__ int pairs() const { return K * (K + 1) / 2; }
    // Entries of a partial result. Per prefix: 0 (NaN if a log-weight is bad), and sums over prefixes of log Z_i,
    // mean_i [K] and covariance_i [pairs]. Global: maximum of the log-weights (NaN if one is bad), sum of
    // exp(log w - max), mean [K] and summed outer products about it [pairs].
    __host__ __device__ int entries() const { return 2 + K + pairs(); }
    __host__ __device__ int tile_stride() const { return K | 1; }  // odd: lanes writing one feature meet no conflict

    __host__ __device__ int64_t warp_doubles() const {
        return int64_t{kWarp} * tile_stride() + kWarp + K + 2 * int64_t{entries()};
    }
    __host__ __device__ int64_t shared_bytes(int warps) const {
        return align16(int64_t{pairs()} * 4) + (warps * warp_doubles() + entries()) * 8;
    }
    __host__ __device__ int64_t finish_bytes() const { return align16(int64_t{pairs()} * 4) + int64_t{entries()} * 8; }
    // Units of work: prefixes, or chunks of samples.
    __host__ __device__ int64_t units() const { return per_prefix ? N : (N * M + kWarp - 1) / kWarp; }
    __host__ int warps() const {
        int warps = kMaxMomentWarps;
        while (warps > 1 && shared_bytes(warps) > kMomentSharedBytes) warps /= 2;
        return warps;
    }
    __host__ int64_t blocks() const {
        const int64_t wanted = (units() + warps() - 1) / warps();
        return wanted < kMaxMomentBlocks ? wanted : kMaxMomentBlocks;
    }
};

// Of a set of samples; the arrays lie in shared memory and belong to one warp.
struct Moments {
    double max, sum;
    double *mean, *scatter;  // [K], [pairs]
};

// A warp's working memory.
struct MomentTile {
    double *features, *weights, *mean;  // [32, stride], [32], [K]
};

// Moments about their own mean of `count` <= 32 samples: tile.mean, weights and centred features; maximum and sum.
template <class Feature, class Base>
__device__ void chunk_moments(
    const Feature* features, const double* mu, const Base* base, int count, const MomentShape& shape,
    const MomentTile& tile, double& max, double& sum) {
    const int lane = threadIdx.x % kWarp, stride = shape.tile_stride();
    double log_w = minus_infinity();
    if (lane < count) {
        double energy = 0;
        for (int k = 0; k < shape.K; ++k) {
            const double f = static_cast<double>(features[lane * int64_t{shape.K} + k]);
            tile.features[lane * stride + k] = f;
            energy += mu[k] * f;
        }
        log_w = (base ? static_cast<double>(base[lane]) : 0.0) - energy;
    }
    max = reduce_warp(log_w, MaxOrNan());
    sum = 0;
    if (!is_finite(max)) return;
    const double w = exp(log_w - max);
    tile.weights[lane] = w;
    sum = reduce_warp(w, Sum());
    __syncwarp();
    for (int k = lane; k < shape.K; k += kWarp) {
        double total = 0;
        for (int j = 0; j < count; ++j) total += tile.weights[j] * tile.features[j * stride + k];
        tile.mean[k] = total / sum;
    }
    __syncwarp();
    if (lane < count)
        for (int k = 0; k < shape.K; ++k) tile.features[lane * stride + k] -= tile.mean[k];
    __syncwarp();
}

// Adds a chunk to a set: Chan's update, with weights on a common scale.
__device__ __forceinline__ void merge_chunk(
    Moments& into, const MomentTile& tile, double max, double sum, int count, const MomentShape& shape,
    const uint32_t* pairs) {
    const int lane = threadIdx.x % kWarp, stride = shape.tile_stride();
    const double common = MaxOrNan()(into.max, max);
    const double keep = into.sum > 0 ? exp(into.max - common) : 0.0, add = exp(max - common);
    const double kept = into.sum * keep, added = sum * add, total = kept + added;
    for (int p = lane; p < shape.pairs(); p += kWarp) {
        const uint32_t a = pairs[p] >> 16, b = pairs[p] & 0xffff;
        double scatter = 0;
        for (int j = 0; j < count; ++j)
            scatter += tile.weights[j] * tile.features[j * stride + a] * tile.features[j * stride + b];
        const double shift = (tile.mean[a] - into.mean[a]) * (tile.mean[b] - into.mean[b]);
        into.scatter[p] = into.scatter[p] * keep + scatter * add + shift * (kept * (added / total));
    }
    __syncwarp();  // before the means change, and the next chunk the tile
    for (int k = lane; k < shape.K; k += kWarp) into.mean[k] += (tile.mean[k] - into.mean[k]) * (added / total);
    into.max = common;
    into.sum = total;
}

// Combines `count` partial results, entry e of the i-th at partial[i * across + e * along], into out[entries]; by the
// whole block, a warp an entry.
__device__ __forceinline__ void combine(
    const double* partial, int64_t count, int64_t across, int64_t along, const MomentShape& shape,
    const uint32_t* pairs, double* out) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    const auto at = [&](int64_t i, int entry) { return partial[i * across + entry * along]; };
    const auto reduce = [&](double start, auto op, auto term) {
        double value = start;
        for (int64_t i = lane; i < count; i += kWarp) value = op(value, term(i));
        return reduce_warp(value, op);
    };
    if (shape.per_prefix) {
        for (int e = warp; e < shape.entries(); e += warps) {
            const double total = reduce(0.0, Sum(), [&](int64_t i) { return at(i, e); });
            if (lane == 0) out[e] = total;
        }
        __syncthreads();
        return;
    }
    const double max = reduce(minus_infinity(), MaxOrNan(), [&](int64_t i) { return at(i, 0); });
    const auto scale = [&](int64_t i) { return at(i, 1) > 0 ? exp(at(i, 0) - max) : 0.0; };
    const double sum = reduce(0.0, Sum(), [&](int64_t i) { return at(i, 1) * scale(i); });
    if (threadIdx.x == 0) {
        out[0] = max;
        out[1] = sum;
    }
    for (int k = warp; k < shape.K; k += warps) {
        const double total = reduce(0.0, Sum(), [&](int64_t i) { return at(i, 1) * scale(i) * at(i, 2 + k); });
        if (lane == 0) out[2 + k] = sum > 0 ? total / sum : 0.0;
    }
    __syncthreads();
    for (int p = warp; p < shape.pairs(); p += warps) {
        const int a = 2 + static_cast<int>(pairs[p] >> 16), b = 2 + static_cast<int>(pairs[p] & 0xffff);
        const double total = reduce(0.0, Sum(), [&](int64_t i) {
            const double shift = (at(i, a) - out[a]) * (at(i, b) - out[b]);
            return scale(i) * (at(i, 2 + shape.K + p) + at(i, 1) * shift);
        });
        if (lane == 0) out[2 + shape.K + p] = total;
    }
    __syncthreads();
}

// pairs[p] = a << 16 | b, a <= b, row by row of the upper triangle.
__device__ __forceinline__ void list_pairs(int K, uint32_t* pairs) {
    for (int a = threadIdx.x; a < K; a += blockDim.x) {
        const int first = a * K - a * (a - 1) / 2;
        for (int b = a; b < K; ++b) pairs[first + b - a] = static_cast<uint32_t>(a) << 16 | static_cast<uint32_t>(b);
    }
    __syncthreads();
}

// partial[entries, gridDim.x]
template <class Feature, class Base>
__global__ void __launch_bounds__(kMaxMomentWarps* kWarp, 1) tilted_moments_kernel(
    const Feature* features, const double* mu, const Base* base, MomentShape shape, double* partial) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    const int K = shape.K, entries = shape.entries();
    uint32_t* const pairs = reinterpret_cast<uint32_t*>(dynamic_shared());
    double* const totals = reinterpret_cast<double*>(dynamic_shared() + align16(int64_t{shape.pairs()} * 4));
    double* const combined = totals + warps * entries;
    double* const own = combined + entries + warp * (shape.warp_doubles() - entries);
    const MomentTile tile{
        own + entries, own + entries + kWarp * shape.tile_stride(), own + entries + kWarp * (shape.tile_stride() + 1)};
    double* const total = totals + warp * entries;
    for (int e = lane; e < entries; e += kWarp) total[e] = own[e] = 0;
    list_pairs(K, pairs);

    const int64_t workers = int64_t{gridDim.x} * warps, worker = int64_t{blockIdx.x} * warps + warp;
    const int64_t begin = shape.units() * worker / workers, end = shape.units() * (worker + 1) / workers;
    if (shape.per_prefix) {
        Moments prefix{minus_infinity(), 0, own + 2, own + 2 + K};
        double log_z = 0, flag = 0;
        for (int64_t i = begin; i < end; ++i) {
            prefix.max = minus_infinity();
            prefix.sum = 0;
            for (int64_t j = 0; j < shape.M; j += kWarp) {
                const int count = static_cast<int>(shape.M - j < kWarp ? shape.M - j : kWarp);
                const int64_t sample = i * shape.M + j;
                double max, sum;
                chunk_moments(features + sample * K, mu, base ? base + sample : nullptr, count, shape, tile, max, sum);
                if (sum > 0)
                    merge_chunk(prefix, tile, max, sum, count, shape, pairs);
                else if (max != minus_infinity())
                    flag = nan_double();
            }
            // Without any weight: -inf, and so no result.
            log_z += prefix.max + log(prefix.sum / static_cast<double>(shape.M));
            for (int e = lane; e < K + shape.pairs(); e += kWarp) {
                total[2 + e] += e < K ? prefix.mean[e] : prefix.scatter[e - K] / prefix.sum;
                own[2 + e] = 0;
            }
        }
        if (lane == 0) {
            total[0] = flag;
            total[1] = log_z;
        }
    } else {
        Moments all{minus_infinity(), 0, total + 2, total + 2 + K};
        for (int64_t i = begin; i < end; ++i) {
            const int64_t sample = i * kWarp, left = shape.N * shape.M - sample;
            const int count = static_cast<int>(left < kWarp ? left : kWarp);
            double max, sum;
            chunk_moments(features + sample * K, mu, base ? base + sample : nullptr, count, shape, tile, max, sum);
            if (sum > 0)
                merge_chunk(all, tile, max, sum, count, shape, pairs);
            else
                all.max = MaxOrNan()(all.max, max);  // NaN and +inf stay, -inf changes nothing
        }
        if (lane == 0) {
            total[0] = all.max;
            total[1] = all.sum;
        }
    }
    __syncthreads();
    combine(totals, warps, entries, 1, shape, pairs, combined);
    for (int e = threadIdx.x; e < entries; e += blockDim.x) partial[int64_t{e} * gridDim.x + blockIdx.x] = combined[e];
}

// One block: the results, from the blocks' partial ones. All NaN where a log-weight is NaN or +inf, or a set has none
// that is finite.
static __global__ void __launch_bounds__(1024) finish_tilted_moments_kernel(
    const double* partial, int64_t count, MomentShape shape, double* log_z, double* mean, double* covariance) {
    uint32_t* const pairs = reinterpret_cast<uint32_t*>(dynamic_shared());
    double* const out = reinterpret_cast<double*>(dynamic_shared() + align16(int64_t{shape.pairs()} * 4));
    list_pairs(shape.K, pairs);
    combine(partial, count, 1, count, shape, pairs, out);
    const bool valid = shape.per_prefix ? is_finite(out[0]) && is_finite(out[1]) : is_finite(out[0]) && out[1] > 0;
    const double n = static_cast<double>(shape.N), samples = n * static_cast<double>(shape.M);
    const double mean_of = shape.per_prefix ? n : 1.0, covariance_of = shape.per_prefix ? n : out[1];
    if (threadIdx.x == 0)
        *log_z = !valid ? nan_double() : shape.per_prefix ? out[1] / n : out[0] + log(out[1] / samples);
    for (int k = threadIdx.x; k < shape.K; k += blockDim.x) mean[k] = valid ? out[2 + k] / mean_of : nan_double();
    for (int p = threadIdx.x; p < shape.pairs(); p += blockDim.x) {
        const int a = static_cast<int>(pairs[p] >> 16), b = static_cast<int>(pairs[p] & 0xffff);
        const double value = valid ? out[2 + shape.K + p] / covariance_of : nan_double();
        covariance[a * shape.K + b] = value;
        covariance[b * shape.K + a] = value;
    }
}

}  // namespace daemon_fast::cuda
