// The pass over a row of logits that token_logprobs and sample_tokens share: log-sum-exp at temperature 1 and at
// another, and, if asked for, how much each block contributes.
//
// It goes block by block; the sums are rescaled whenever a block raises the running maximum. Differences from the
// maximum and sums are float64: in float32, x - max alone would cost more than 1e-6 of a small log-probability.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "checks.h"
#include "cpu/vec.h"

namespace daemon_fast::cpu {

constexpr int64_t kBlock = 512;  // 4 KiB as float64: stays in the L1 cache between its two visits

template <class Logit>
DAEMON_FAST_INLINE void widen(const Logit* from, int64_t count, double* to) {
    for (int64_t v = 0; v < count; ++v) to[v] = static_cast<double>(static_cast<float>(from[v]));
    for (int64_t v = count; v % kLanes; ++v) to[v] = -kInf;
}

struct LogSums {
    double plain, tempered;  // log-sum-exp of x - max at temperature 1, and of (x - max) / temperature
    double max;
};

// What a block of kBlock ids adds to the sum at the temperature: Σ exp((x - origin) / temperature).
struct BlockSum {
    double origin, sum;
};

template <bool Tempered, class Logit>
DAEMON_FAST_INLINE LogSums
log_sums(const Logit* logits, int64_t V, double inverse_temperature, BlockSum* blocks = nullptr) {
    double max = -kInf;
    Vec plain = Vec{}, tempered = Vec{};
    double block[kBlock];
    for (int64_t begin = 0; begin < V; begin += kBlock) {
        const int64_t count = V - begin < kBlock ? V - begin : kBlock;
        widen(logits + begin, count, block);
        Vec block_max = splat(max);
        for (int64_t v = 0; v < count; v += kLanes) {
            const Vec x = load_vec(block + v);
            block_max = x > block_max ? x : block_max;
        }
        double new_max = max;
        for (int64_t lane = 0; lane < kLanes; ++lane) new_max = block_max[lane] > new_max ? block_max[lane] : new_max;
        if (new_max > max) {
            if (max > -kInf) {
                plain *= std::exp(max - new_max);
                if (Tempered) tempered *= std::exp((max - new_max) * inverse_temperature);
            }
            max = new_max;
        }
        // Nothing but -inf so far: measured from 0, such a block adds exp(-inf) = 0, and a NaN shows.
        const double origin = max > -kInf ? max : 0.0;
        Vec own_plain = Vec{}, own_tempered = Vec{};
        for (int64_t v = 0; v < count; v += kLanes) {
            const Vec x = load_vec(block + v) - origin;
            own_plain += exp_nonpositive<7>(x);
            if (Tempered) own_tempered += exp_nonpositive<7>(x * inverse_temperature);
        }
        plain += own_plain;
        tempered += own_tempered;
        if (blocks) blocks[begin / kBlock] = {origin, sum_lanes(Tempered ? own_tempered : own_plain)};
    }
    const double log_plain = std::log(sum_lanes(plain));
    return {log_plain, Tempered ? std::log(sum_lanes(tempered)) : log_plain, max};
}

// run(logit) with a value of the logits' type.
template <class Run>
void with_logit_type(const Tensor& logits, const Run& run) {
    switch (logits.scalar_type()) {
        case ScalarType::Half: run(torch::headeronly::Half{}); break;
        case ScalarType::BFloat16: run(torch::headeronly::BFloat16{}); break;
        default: run(float{});
    }
}

}  // namespace daemon_fast::cpu
