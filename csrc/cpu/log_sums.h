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

template <class To, class From>
DAEMON_FAST_INLINE To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// torch's conversions of float16 give the same, but no compiler makes vector code of them: they take 2 ns an element.
// (Here, too, std::min and std::max, or a `?:` with arithmetic on one side, would leave a branch.)
template <class Logit>
DAEMON_FAST_INLINE float to_float(Logit x) {
    return static_cast<float>(x);
}
template <>
DAEMON_FAST_INLINE float to_float(torch::headeronly::Half x) {
    const uint32_t all = x.x, magnitude = (all & 0x7fff) << 13;
    // An exponent is biased by 15 there and 127 here; the multiplication takes subnormal numbers along.
    const uint32_t finite = bits_as<uint32_t>(bits_as<float>(magnitude) * 0x1p112f);
    const uint32_t infinite = magnitude >= 0x0f800000 ? 0x7f800000 : 0;
    return bits_as<float>(finite | infinite | (all & 0x8000) << 16);
}

template <class Logit>
DAEMON_FAST_INLINE Logit from_float(float x) {
    return static_cast<Logit>(x);
}
template <>
DAEMON_FAST_INLINE torch::headeronly::Half from_float(float x) {
    constexpr uint32_t kLeast = 0x38800000, kInfinite = 0x47800000;  // 2^-14, 2^16
    const uint32_t all = bits_as<uint32_t>(x), absolute = all & 0x7fffffff;
    const uint32_t magnitude = absolute < kInfinite ? absolute : kInfinite, own = magnitude & 0x7f800000;
    const uint32_t exponent = own > kLeast ? own : kLeast;
    // Adding a power of two rounds, ties to even, to the 10 bits of the fraction, or to what a subnormal number has of
    // them.
    const uint32_t power = exponent + (13 << 23);
    const uint32_t steps = bits_as<uint32_t>(bits_as<float>(magnitude) + bits_as<float>(power)) - power;
    const uint32_t nan = absolute > 0x7f800000 ? 0x200 : 0;
    const uint32_t bits = (steps + ((exponent - kLeast) >> 13)) | nan | (all & 0x80000000) >> 16;
    return {static_cast<uint16_t>(bits), torch::headeronly::Half::from_bits()};
}

template <class Logit>
DAEMON_FAST_INLINE void widen(const Logit* from, int64_t count, double* to) {
    for (int64_t v = 0; v < count; ++v) to[v] = static_cast<double>(to_float(from[v]));
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
