// Device side of token_logprobs: one row of logits a block, read once; for the gradient, a second time, over what the
// first left in the cache.
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

// `grad` [R, V] is contiguous. An id outside [0, V) gives NaN.
template <class Logit, class Id, bool kTempered, int kThreads>
__global__ void __launch_bounds__(kThreads, 2) token_logprobs_backward_kernel(
    const float* grad_log_p, int64_t p_stride, const float* grad_log_q, int64_t q_stride, const Logit* logits,
    int64_t row_stride, const Id* ids, int64_t id_stride, int64_t R, int64_t V, float inverse, Logit* grad) {
    using Reduce = cub::BlockReduce<LogSums, kThreads>;
    __shared__ typename Reduce::TempStorage storage;
    __shared__ LogSums merged;
    for (int64_t r = blockIdx.x; r < R; r += gridDim.x) {
        const Logit* const row = logits + r * row_stride;
        Logit* const out = grad + r * V;
        const float g_p = grad_log_p[r * p_stride], g_q = grad_log_q[r * q_stride];
        if (g_p == 0 && g_q == 0) {  // a token that the loss leaves out
            for (int64_t v = threadIdx.x; v < V; v += kThreads) out[v] = from_float<Logit>(0);
            continue;
        }
        LogSums sums = scan_row<Logit, kTempered>(row, V, inverse);
        sums = Reduce(storage).Reduce(sums, Merge<kTempered>{inverse});
        if (threadIdx.x == 0) merged = sums;
        __syncthreads();
        sums = merged;
        const float p = kTempered ? g_p : g_p + g_q, q = kTempered ? g_q * inverse : 0;
        const int64_t id = static_cast<int64_t>(ids[r * id_stride]);
        const bool known = id >= 0 && id < V;
        const float plain = known ? -p / sums.plain : nan_float(), tempered = kTempered ? -q / sums.tempered : 0;
        // One load in flight: with more, registers are spilled.
        walk_row<1>(row, V, [&](int64_t first, const auto& x) {
            constexpr int kCount = sizeof(x) / sizeof(float);
            float g[kCount];
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                const float down = (x[i] - sums.max) * kLog2E;
                g[i] = plain * exp2f(down);
                if (kTempered) g[i] += tempered * exp2f(down * inverse);
            }
            store(out + first, g);
        });
        __syncthreads();  // the id's entry is overwritten, and by the next row what is shared
        if (threadIdx.x == 0 && known) {
            // 1 - softmax, with all its digits where the softmax is next to 1
            const float x = to_float(row[id]) - sums.max;
            float at_id = -p * expm1f(x - logf(sums.plain));
            if (kTempered) at_id -= q * expm1f(x * inverse - logf(sums.tempered));
            out[id] = from_float<Logit>(at_id);
        }
    }
}

}  // namespace daemon_fast::cuda
