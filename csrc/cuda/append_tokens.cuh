// Device side of append_tokens: a thread a drawn id.
#pragma once

#include "cuda/device.cuh"

namespace daemon_fast::cuda {

// A slot outside marks its rows by a length of -1; a row outside is left out.
__global__ void __launch_bounds__(128) append_tokens_kernel(
    int64_t* tokens, float* log_p, float* log_q, int64_t* lengths, bool* running, int64_t T, int64_t R,
    const int64_t* ids, const float* ids_log_p, const float* ids_log_q, int64_t drawn, const int64_t* slot,
    const int64_t* rows, const int64_t* eos, int64_t eos_count, bool count_eos) {
    const int64_t t = *slot;
    for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < drawn;
         i += gridDim.x * static_cast<int64_t>(blockDim.x)) {
        const int64_t row = rows[i], id = ids[i];
        if (row < 0 || row >= R || !running[row]) continue;
        if (t < 0 || t >= T) {
            lengths[row] = -1;
            continue;
        }
        bool is_eos = false;
        for (int64_t e = 0; e < eos_count; ++e) is_eos |= eos[e] == id;
        const int64_t at = t * R + row;
        tokens[at] = id < 0 ? 0 : id;
        log_p[at] = ids_log_p[i];
        log_q[at] = ids_log_q[i];
        lengths[row] += id >= 0 && (count_eos || !is_eos);
        running[row] = id >= 0 && !is_eos;
    }
}

}  // namespace daemon_fast::cuda
