// Device side of sample_tokens: one row of logits a block. A first pass finds maximum and sums; a second one, over what
// the first left in the cache, adds up probabilities tile by tile, in the order of the ids, until the uniform is
// passed.
#pragma once

#include "cuda/log_sums.cuh"

namespace daemon_fast::cuda {

constexpr int kTileItems = 4;  // ids a thread adds up before the block's scan

// A row without a distribution, or a uniform outside [0, 1), gives -1 and NaN.
template <class Logit, bool kTempered, int kThreads>
__global__ void __launch_bounds__(kThreads, 1) sample_tokens_kernel(
    const Logit* logits, int64_t row_stride, const double* uniforms, int64_t uniform_stride, int64_t R, int64_t V,
    float inverse, int64_t* ids, float* log_p, float* log_q) {
    using Merger = cub::BlockReduce<LogSums, kThreads>;
    using Scan = cub::BlockScan<double, kThreads>;
    using Reduce = Reduction<kThreads>;
    __shared__ typename Merger::TempStorage merger_storage;
    __shared__ typename Scan::TempStorage scan_storage;
    __shared__ typename Reduce::Storage reduce_storage;
    __shared__ LogSums merged;
    Reduce reduce(reduce_storage);
    for (int64_t r = blockIdx.x; r < R; r += gridDim.x) {
        const Logit* const row = logits + r * row_stride;
        const LogSums own =
            Merger(merger_storage).Reduce(scan_row<Logit, kTempered>(row, V, inverse), Merge<kTempered>{inverse});
        if (threadIdx.x == 0) merged = own;
        __syncthreads();
        const LogSums sums = merged;
        const double total = kTempered ? sums.tempered : sums.plain, uniform = uniforms[r * uniform_stride];
        const bool valid =
            uniform >= 0 && uniform < 1 && total > 0 && is_finite(total) && is_finite(static_cast<double>(sums.max));
        const double target = uniform * total;
        double before = 0, chosen = static_cast<double>(V), last = -1;
        constexpr int64_t kTile = kThreads * kTileItems;
        for (int64_t tile = 0; valid && tile < V && chosen == V; tile += kTile) {
            const int64_t begin = tile + static_cast<int64_t>(threadIdx.x) * kTileItems;
            double p[kTileItems], sum = 0;
#pragma unroll
            for (int i = 0; i < kTileItems; ++i) {
                const int64_t v = begin + i;
                p[i] = v < V ? static_cast<double>(exp2f((to_float(row[v]) - sums.max) * kLog2E * inverse)) : 0.0;
                sum += p[i];
                if (p[i] > 0) last = static_cast<double>(v);
            }
            double inclusive, tile_sum;
            Scan(scan_storage).InclusiveSum(sum, inclusive, tile_sum);
            double cumulative = before + (inclusive - sum), first = static_cast<double>(V);
#pragma unroll
            for (int i = 0; i < kTileItems; ++i) {
                cumulative += p[i];
                if (p[i] > 0 && cumulative > target) first = Min()(first, static_cast<double>(begin + i));
            }
            before += tile_sum;
            chosen = reduce(first, Min());  // its barriers also free the scan's storage
        }
        // Rounding can leave the target above all sums: then it is the last id that can be drawn.
        if (chosen == V) chosen = reduce(last, MaxOrNan());
        if (threadIdx.x == 0) {
            const int64_t id = valid ? static_cast<int64_t>(chosen) : -1;
            const float x = id >= 0 ? to_float(row[id]) - sums.max : nan_float();
            ids[r] = id;
            log_p[r] = x - logf(sums.plain);
            log_q[r] = kTempered ? x * inverse - logf(sums.tempered) : log_p[r];
        }
        __syncthreads();  // the next row overwrites what is shared
    }
}

}  // namespace daemon_fast::cuda
