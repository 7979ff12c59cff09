// Device side of token_logprobs: one row of logits a block, read once.
#pragma once

#include "cuda/log_sums.cuh"

namespace daemon_fast::cuda {

// An id outside [0, V) gives NaN.
template <class Logit, class Id, bool kTempered, int kThreads>
__global__ void __launch_bounds__(kThreads, 2) token_logprobs_kernel(
    const Logit* logits, int64_t row_stride, const Id* ids, int64_t id_stride, int64_t R, int64_t V, float inverse,
    float* log_p, float* log_q) {
    using Reduce = cub::BlockReduce<LogSums, kThreads>;
    __shared__ typename Reduce::TempStorage storage;
    for (int64_t r = blockIdx.x; r < R; r += gridDim.x) {
        const Logit* const row = logits + r * row_stride;
        LogSums sums = scan_row<Logit, kTempered>(row, V, inverse);
        sums = Reduce(storage).Reduce(sums, Merge<kTempered>{inverse});
        if (threadIdx.x == 0) {
            const int64_t id = static_cast<int64_t>(ids[r * id_stride]);
            const bool known = id >= 0 && id < V;
            const float x = known ? to_float(row[id]) - sums.max : nan_float();
            // -inf - -inf, in a row of nothing but -inf, is NaN too
            log_p[r] = x - logf(sums.plain);
            log_q[r] = kTempered ? x * inverse - logf(sums.tempered) : log_p[r];
        }
        __syncthreads();  // the next row's reduction overwrites the storage
    }
}

}  // namespace daemon_fast::cuda
