// Device side of tilted_moments: log Z, mean and covariance of the features under weights exp(b - mu . f), in float64.
//
// Each warp takes 32 samples at a time: log-weights, their maximum, weights, mean, and outer products about that mean,
// so that no large numbers cancel. Chunks of one set of samples are merged by Chan's update. What a set is, and how the
// partial results of warps and then of blocks are combined, depends on the normalisation of the weights: PerPrefix or
// Global, below. The order is fixed, over a grid that does not depend on the GPU: the result is the same on every run
// and every device.
#pragma once

#include "cuda/device.cuh"

namespace daemon_fast::cuda {

constexpr int64_t kMaxMomentBlocks = 264;  // two for each multiprocessor of an H100 or H200
constexpr int kMaxMomentWarps = 8;
constexpr int64_t kMomentSharedBytes = 48 * 1024;  // what every device grants a block without asking

struct MomentShape {
    int64_t N, M;
    int K;

    __host__ __device__ int pairs() const { return K * (K + 1) / 2; }
    // Of a partial result: two numbers, a mean [K] and a covariance [pairs].
    __host__ __device__ int entries() const { return 2 + K + pairs(); }
    __host__ __device__ int tile_stride() const { return K | 1; }  // odd: lanes writing one feature meet no conflict

    __host__ __device__ int64_t warp_doubles() const {
        return int64_t{kWarp} * tile_stride() + kWarp + K + 2 * int64_t{entries()};
    }
    __host__ __device__ int64_t shared_bytes(int warps) const {
        return align16(int64_t{pairs()} * 4) + (warps * warp_doubles() + entries()) * 8;
    }
    __host__ __device__ int64_t finish_bytes() const { return align16(int64_t{pairs()} * 4) + int64_t{entries()} * 8; }
    __host__ int warps() const {
        int warps = kMaxMomentWarps;
        while (warps > 1 && shared_bytes(warps) > kMomentSharedBytes) warps /= 2;
        return warps;
    }
    __host__ int64_t blocks(int64_t units) const {
        const int64_t wanted = (units + warps() - 1) / warps();
        return wanted < kMaxMomentBlocks ? wanted : kMaxMomentBlocks;
    }
};

template <class Feature, class Base>
struct MomentInput {
    const Feature* features;  // [N, M, K]
    const double* mu;         // [K]
    const Base* base;         // [N, M], or null
};

// Of a set of samples; the arrays lie in shared memory and belong to one warp.
struct Moments {
    double max, sum;
    double *mean, *scatter;  // [K], [pairs]
};

// A warp's working memory for a chunk of samples.
struct MomentTile {
    double *features, *weights, *mean;  // [32, stride], [32], [K]
};

// Moments about their own mean of `count` <= 32 samples from `first`: tile.mean, weights and centred features; maximum
// and sum.
template <class Feature, class Base>
__device__ void chunk_moments(
    const MomentInput<Feature, Base>& input, int64_t first, int count, const MomentShape& shape, const MomentTile& tile,
    double& max, double& sum) {
    const int lane = threadIdx.x % kWarp, stride = shape.tile_stride();
    double log_w = minus_infinity();
    if (lane < count) {
        double energy = 0;
        for (int k = 0; k < shape.K; ++k) {
            const double f = static_cast<double>(input.features[(first + lane) * shape.K + k]);
            tile.features[lane * stride + k] = f;
            energy += input.mu[k] * f;
        }
        log_w = (input.base ? static_cast<double>(input.base[first + lane]) : 0.0) - energy;
    }
    max = reduce_max(log_w);
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

// The weighted sum of products of features a and b about their means.
__device__ __forceinline__ double chunk_scatter(const MomentTile& tile, int count, int stride, uint32_t pair) {
    const double *a = tile.features + (pair >> 16), *b = tile.features + (pair & 0xffff);
    double scatter = 0;
    for (int j = 0; j < count; ++j, a += stride, b += stride) scatter += tile.weights[j] * *a * *b;
    return scatter;
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
        const double scatter = chunk_scatter(tile, count, stride, pairs[p]);
        const double shift = (tile.mean[a] - into.mean[a]) * (tile.mean[b] - into.mean[b]);
        into.scatter[p] = into.scatter[p] * keep + scatter * add + shift * (kept * (added / total));
    }
    __syncwarp();  // before the means change, and the next chunk the tile
    for (int k = lane; k < shape.K; k += kWarp) into.mean[k] += (tile.mean[k] - into.mean[k]) * (added / total);
    into.max = common;
    into.sum = total;
}

// `count` partial results, entry e of the i-th at values[i * across + e * along].
struct Partials {
    const double* values;
    int64_t count, across, along;

    __device__ __forceinline__ double at(int64_t i, int entry) const { return values[i * across + entry * along]; }

    // Of term(i) over all i, by a full warp.
    template <class Op, class Term>
    __device__ __forceinline__ double reduce(double start, Op op, const Term& term) const {
        double value = start;
        for (int64_t i = threadIdx.x % kWarp; i < count; i += kWarp) value = op(value, term(i));
        return reduce_warp(value, op);
    }
};

// What a warp works with, in shared memory.
struct WarpMemory {
    MomentTile tile;
    double* set;      // [entries] zeros at first
    double* partial;  // [entries] its result, zeros at first
};

// What becomes of combined entries: log Z, and what mean and covariance must be divided by. Not valid where a
// log-weight is NaN or +inf, or a set has none that is finite.
struct Outcome {
    bool valid;
    double log_z, mean_divisor, covariance_divisor;
};

// ---- weights that sum to 1 within each prefix --------------------------------------------------------------------

// Entries are sums over prefixes: 0 is NaN if a log-weight is bad, 1 of log Z_i, then of mean_i and covariance_i.
struct PerPrefix {
    static __host__ __device__ int64_t units(const MomentShape& shape) { return shape.N; }

    // Prefixes [begin, end), by one warp.
    template <class Input>
    static __device__ __forceinline__ void add_up(
        const Input& input, int64_t begin, int64_t end, const MomentShape& shape, const uint32_t* pairs,
        const WarpMemory& warp) {
        const int lane = threadIdx.x % kWarp, K = shape.K;
        double log_z = 0, bad = 0;
        const auto finish = [&](double max, double sum) {  // without any weight: -inf, and so no result
            log_z += max + log(sum / static_cast<double>(shape.M));
        };
        if (shape.M <= kWarp) {  // a prefix is one chunk, with nothing to merge
            const int count = static_cast<int>(shape.M);
            for (int64_t i = begin; i < end; ++i) {
                double max, sum;
                chunk_moments(input, i * shape.M, count, shape, warp.tile, max, sum);
                finish(max, sum);
                if (!(sum > 0)) {
                    if (max != minus_infinity()) bad = nan_double();
                    continue;
                }
                for (int k = lane; k < K; k += kWarp) warp.partial[2 + k] += warp.tile.mean[k];
                for (int p = lane; p < shape.pairs(); p += kWarp)
                    warp.partial[2 + K + p] += chunk_scatter(warp.tile, count, shape.tile_stride(), pairs[p]) / sum;
                __syncwarp();  // before the next chunk overwrites the tile
            }
            begin = end;
        }
        Moments prefix{minus_infinity(), 0, warp.set, warp.set + K};
        for (int64_t i = begin; i < end; ++i) {
            prefix.max = minus_infinity();
            prefix.sum = 0;
            for (int64_t j = 0; j < shape.M; j += kWarp) {
                const int count = static_cast<int>(shape.M - j < kWarp ? shape.M - j : kWarp);
                double max, sum;
                chunk_moments(input, i * shape.M + j, count, shape, warp.tile, max, sum);
                if (sum > 0)
                    merge_chunk(prefix, warp.tile, max, sum, count, shape, pairs);
                else if (max != minus_infinity())
                    bad = nan_double();
            }
            finish(prefix.max, prefix.sum);
            for (int e = lane; e < K + shape.pairs(); e += kWarp) {
                warp.partial[2 + e] += e < K ? prefix.mean[e] : prefix.scatter[e - K] / prefix.sum;
                warp.set[e] = 0;
            }
        }
        if (lane == 0) {
            warp.partial[0] = bad;
            warp.partial[1] = log_z;
        }
    }

    // By the whole block, a warp an entry.
    static __device__ __forceinline__ void combine(
        const Partials& partials, const MomentShape& shape, const uint32_t*, double* out) {
        for (int e = threadIdx.x / kWarp; e < shape.entries(); e += blockDim.x / kWarp) {
            const double total = partials.reduce(0.0, Sum(), [&](int64_t i) { return partials.at(i, e); });
            if (threadIdx.x % kWarp == 0) out[e] = total;
        }
        __syncthreads();
    }

    static __device__ __forceinline__ Outcome outcome(const double* out, const MomentShape& shape) {
        const double n = static_cast<double>(shape.N);
        return {is_finite(out[0]) && is_finite(out[1]), out[1] / n, n, n};
    }
};

// ---- weights that sum to 1 over all samples ----------------------------------------------------------------------

// Entries: 0 is the maximum of the log-weights, NaN if one is bad; 1 the sum of exp(log w - max); then the mean and the
// summed outer products about it.
struct Global {
    static __host__ __device__ int64_t units(const MomentShape& shape) {
        return (shape.N * shape.M + kWarp - 1) / kWarp;
    }

    // Chunks [begin, end) of 32 samples, by one warp.
    template <class Input>
    static __device__ __forceinline__ void add_up(
        const Input& input, int64_t begin, int64_t end, const MomentShape& shape, const uint32_t* pairs,
        const WarpMemory& warp) {
        Moments all{minus_infinity(), 0, warp.partial + 2, warp.partial + 2 + shape.K};
        for (int64_t i = begin; i < end; ++i) {
            const int64_t left = shape.N * shape.M - i * kWarp;
            const int count = static_cast<int>(left < kWarp ? left : kWarp);
            double max, sum;
            chunk_moments(input, i * kWarp, count, shape, warp.tile, max, sum);
            if (sum > 0)
                merge_chunk(all, warp.tile, max, sum, count, shape, pairs);
            else
                all.max = MaxOrNan()(all.max, max);  // NaN and +inf stay, -inf changes nothing
        }
        if (threadIdx.x % kWarp == 0) {
            warp.partial[0] = all.max;
            warp.partial[1] = all.sum;
        }
    }

    // By the whole block, a warp an entry.
    static __device__ __forceinline__ void combine(
        const Partials& partials, const MomentShape& shape, const uint32_t* pairs, double* out) {
        const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
        const auto at = [&](int64_t i, int entry) { return partials.at(i, entry); };
        const double max = partials.reduce(minus_infinity(), MaxOrNan(), [&](int64_t i) { return at(i, 0); });
        const auto scale = [&](int64_t i) { return at(i, 1) > 0 ? exp(at(i, 0) - max) : 0.0; };
        const double sum = partials.reduce(0.0, Sum(), [&](int64_t i) { return at(i, 1) * scale(i); });
        if (threadIdx.x == 0) {
            out[0] = max;
            out[1] = sum;
        }
        for (int k = warp; k < shape.K; k += warps) {
            const double total =
                partials.reduce(0.0, Sum(), [&](int64_t i) { return at(i, 1) * scale(i) * at(i, 2 + k); });
            if (lane == 0) out[2 + k] = sum > 0 ? total / sum : 0.0;
        }
        __syncthreads();
        for (int p = warp; p < shape.pairs(); p += warps) {
            const int a = 2 + static_cast<int>(pairs[p] >> 16), b = 2 + static_cast<int>(pairs[p] & 0xffff);
            const double total = partials.reduce(0.0, Sum(), [&](int64_t i) {
                const double shift = (at(i, a) - out[a]) * (at(i, b) - out[b]);
                return scale(i) * (at(i, 2 + shape.K + p) + at(i, 1) * shift);
            });
            if (lane == 0) out[2 + shape.K + p] = total;
        }
        __syncthreads();
    }

    static __device__ __forceinline__ Outcome outcome(const double* out, const MomentShape& shape) {
        const double samples = static_cast<double>(shape.N) * static_cast<double>(shape.M);
        return {is_finite(out[0]) && out[1] > 0, out[0] + log(out[1] / samples), 1.0, out[1]};
    }
};

// ---- kernels -----------------------------------------------------------------------------------------------------

// pairs[p] = a << 16 | b, a <= b, row by row of the upper triangle.
__device__ __forceinline__ void list_pairs(int K, uint32_t* pairs) {
    for (int a = threadIdx.x; a < K; a += blockDim.x) {
        const int first = a * K - a * (a - 1) / 2;
        for (int b = a; b < K; ++b) pairs[first + b - a] = static_cast<uint32_t>(a) << 16 | static_cast<uint32_t>(b);
    }
    __syncthreads();
}

// partial[entries, gridDim.x]
template <class Normalization, class Feature, class Base>
__global__ void __launch_bounds__(kMaxMomentWarps* kWarp, 1)
    tilted_moments_kernel(MomentInput<Feature, Base> input, MomentShape shape, double* partial) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    const int entries = shape.entries();
    uint32_t* const pairs = reinterpret_cast<uint32_t*>(dynamic_shared());
    double* const totals = reinterpret_cast<double*>(dynamic_shared() + align16(int64_t{shape.pairs()} * 4));
    double* const combined = totals + warps * entries;
    double* const own = combined + entries + warp * (shape.warp_doubles() - entries);
    double* const tile = own + entries;
    const WarpMemory memory{
        {tile, tile + kWarp * shape.tile_stride(), tile + kWarp * (shape.tile_stride() + 1)},
        own,
        totals + warp * entries};
    for (int e = lane; e < entries; e += kWarp) memory.partial[e] = memory.set[e] = 0;
    list_pairs(shape.K, pairs);

    const int64_t workers = int64_t{gridDim.x} * warps, worker = int64_t{blockIdx.x} * warps + warp;
    const int64_t units = Normalization::units(shape);
    Normalization::add_up(input, units * worker / workers, units * (worker + 1) / workers, shape, pairs, memory);
    __syncthreads();
    Normalization::combine(Partials{totals, warps, entries, 1}, shape, pairs, combined);
    for (int e = threadIdx.x; e < entries; e += blockDim.x) partial[int64_t{e} * gridDim.x + blockIdx.x] = combined[e];
}

// One block: the results, from the partial ones of `count` blocks; all NaN where there are none.
template <class Normalization>
__global__ void __launch_bounds__(1024) finish_tilted_moments_kernel(
    const double* partial, int64_t count, MomentShape shape, double* log_z, double* mean, double* covariance) {
    uint32_t* const pairs = reinterpret_cast<uint32_t*>(dynamic_shared());
    double* const out = reinterpret_cast<double*>(dynamic_shared() + align16(int64_t{shape.pairs()} * 4));
    list_pairs(shape.K, pairs);
    Normalization::combine(Partials{partial, count, 1, count}, shape, pairs, out);
    const Outcome result = Normalization::outcome(out, shape);
    const auto value = [&](double x) { return result.valid ? x : nan_double(); };
    if (threadIdx.x == 0) *log_z = value(result.log_z);
    for (int k = threadIdx.x; k < shape.K; k += blockDim.x) mean[k] = value(out[2 + k] / result.mean_divisor);
    for (int p = threadIdx.x; p < shape.pairs(); p += blockDim.x) {
        const int a = static_cast<int>(pairs[p] >> 16), b = static_cast<int>(pairs[p] & 0xffff);
        covariance[a * shape.K + b] = covariance[b * shape.K + a] =
            value(out[2 + shape.K + p] / result.covariance_divisor);
    }
}

}  // namespace daemon_fast::cuda
