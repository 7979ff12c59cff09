// Host side of the kernels over rows of logits: which one a call needs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/launch.h"

namespace daemon_fast::cuda {

// V, for kernels that count ids in 32 bits.
inline int vocabulary(const char* op, const Tensor& logits) {
    constexpr int64_t kMax = int64_t{1} << 30;
    const int64_t V = logits.size(1);
    if (V > kMax) fail(op, ": logits.shape[1] = ", V, " exceeds the maximum ", kMax, " on CUDA");
    return static_cast<int>(V);
}

// run(logit, tempered) with a value of the logits' type, and whether the temperature is another than 1 as a
// compile-time constant.
template <class Run>
void with_logits(const Tensor& logits, double temperature, const Run& run) {
    const auto with_temperature = [&](auto logit) {
        temperature == 1.0 ? run(logit, std::false_type()) : run(logit, std::true_type());
    };
    switch (logits.scalar_type()) {
        case ScalarType::Half: with_temperature(__half{}); break;
        case ScalarType::BFloat16: with_temperature(__nv_bfloat16{}); break;
        default: with_temperature(float{});
    }
}

}  // namespace daemon_fast::cuda
