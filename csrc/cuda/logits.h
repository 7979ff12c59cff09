// Host side of the kernels over rows of logits: which one a call needs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/launch.h"

namespace daemon_fast::cuda {

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
