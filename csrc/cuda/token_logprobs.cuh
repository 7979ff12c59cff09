// Device side of token_logprobs: one row of logits a block, read once; for the gradient, a second time, over what the
// first left in the cache.
#pragma once

#include "cuda/log_sums.cuh"

namespace daemon_fast::cuda {

constexpr int kLogitThreads = 256;  // few enough for cheap barriers, many enough that a last wave of rows is short

// An id outside [0, V) gives NaN.
template <class Logit, class Id, bool kTempered, int kThreads>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads) token_logprobs_kernel(
    const Logit* logits, int64_t row_stride, const Id* ids, int64_t id_stride, int64_t R, int V,
    Temperature temperature, float* log_p, float* log_q) {
    __shared__ LogSums storage[kThreads / kWarp];
    for (int64_t r = blockIdx.x; r < R; r += gridDim.x) {
        const Logit* const row = logits + r * row_stride;
        float x = nan_float();
        if (threadIdx.x == 0) {  // first, so that it does not wait for memory at the end
            const int64_t id = static_cast<int64_t>(ids[r * id_stride]);
            if (id >= 0 && id < V) x = to_float(row[id]);
        }
        const LogSums own = scan_row<Logit, kTempered, kThreads>(row, V, threadIdx.x, temperature);
        const LogSums sums = merge_block<kTempered, kThreads>(own, temperature, storage);
        if (threadIdx.x == 0) {
            // In a row of nothing but -inf: -inf - -inf, which is NaN.
            log_p[r] = x - sums.max - logf(sums.plain);
            log_q[r] = kTempered ? (x - sums.max) * temperature.inverse - logf(sums.tempered) : log_p[r];
        }
        __syncthreads();  // the next row's sums overwrite the storage
    }
}

// `grad` [R, V] is contiguous. An id outside [0, V) gives NaN.
template <class Logit, class Id, bool kTempered, int kThreads>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads) token_logprobs_backward_kernel(
    const float* grad_log_p, int64_t p_stride, const float* grad_log_q, int64_t q_stride, const Logit* logits,
    int64_t row_stride, const Id* ids, int64_t id_stride, int64_t R, int V, Temperature temperature, Logit* grad) {
    __shared__ LogSums storage[kThreads / kWarp], merged;
    for (int64_t r = blockIdx.x; r < R; r += gridDim.x) {
        const Logit* const row = logits + r * row_stride;
        Logit* const out = grad + r * V;
        const float g_p = grad_log_p[r * p_stride], g_q = grad_log_q[r * q_stride];
        if (g_p == 0 && g_q == 0) {  // a token that the loss leaves out
            for (int v = threadIdx.x; v < V; v += kThreads) out[v] = from_float<Logit>(0);
            continue;
        }
        const LogSums own = scan_row<Logit, kTempered, kThreads>(row, V, threadIdx.x, temperature);
        LogSums sums = merge_block<kTempered, kThreads>(own, temperature, storage);
        if (threadIdx.x == 0) merged = sums;
        __syncthreads();
        sums = merged;
        const float p = kTempered ? g_p : g_p + g_q, q = kTempered ? g_q * temperature.inverse : 0;
        const int64_t id = static_cast<int64_t>(ids[r * id_stride]);
        const bool known = id >= 0 && id < V;
        const float plain = known ? -p / sums.plain : nan_float(), tempered = kTempered ? -q / sums.tempered : 0;
        // One load in flight: with more, registers are spilled.
        walk_row<1, kThreads>(row, V, threadIdx.x, [&](int first, const auto& x) {
            constexpr int kCount = sizeof(x) / sizeof(float);
            float g[kCount];
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                const float down = x[i] - sums.max;
                g[i] = plain * fast_exp2(down * kLog2E);
                if (kTempered) g[i] += tempered * fast_exp2(down * temperature.scale);
            }
            store(out + first, g);
        });
        __syncthreads();  // the id's entry is overwritten, and by the next row what is shared
        if (threadIdx.x == 0 && known) {
            // 1 - softmax, with all its digits where the softmax is next to 1
            const float x = to_float(row[id]) - sums.max;
            float at_id = -p * expm1f(x - logf(sums.plain));
            if (kTempered) at_id -= q * expm1f(x * temperature.inverse - logf(sums.tempered));
            out[id] = from_float<Logit>(at_id);
        }
    }
}

}  // namespace daemon_fast::cuda
