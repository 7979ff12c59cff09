// Four doubles at a time, as GCC vectors: one AVX2 register, or two of SSE2 in the baseline build. (Vectors wider
// than the target's registers were three times slower: GCC lowers their comparisons and shifts to scalar code.) The
// fixed lane count gives the same order of summation everywhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/dispatch.h"

namespace daemon_fast::cpu {

constexpr int64_t kLanes = 4;
using Vec = double __attribute__((vector_size(kLanes * sizeof(double))));
using VecBits = int64_t __attribute__((vector_size(kLanes * sizeof(double))));

constexpr double kInf = std::numeric_limits<double>::infinity();

DAEMON_FAST_INLINE Vec splat(double value) {
    return Vec{} + value;
}

DAEMON_FAST_INLINE Vec load_vec(const double* from) {
    Vec v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

DAEMON_FAST_INLINE void store_vec(double* to, Vec v) {
    std::memcpy(to, &v, sizeof v);
}

DAEMON_FAST_INLINE double sum_lanes(Vec v) {
    return (v[0] + v[2]) + (v[1] + v[3]);
}

// exp(x) for x <= 0 (and NaN): x = n ln 2 + r with |r| <= ln 2 / 2, and exp(r) as its Taylor polynomial. Degree 13
// leaves a relative error of 2e-16, degree 7 of 5e-9. Results below 2^-1021 are flushed to 0.
template <int Degree>
DAEMON_FAST_INLINE Vec exp_nonpositive(Vec x) {
    static_assert(Degree == 7 || Degree == 13);
    constexpr double kLog2E = 1.4426950408889634;
    constexpr double kLn2High = 0.693147180369123816490, kLn2Low = 1.90821492927058770002e-10;
    constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer, kept in the low bits
    const Vec shifted = x * kLog2E + kRound;
    const Vec n = shifted - kRound;
    const Vec r = (x - n * kLn2High) - n * kLn2Low;
    Vec p;
    if constexpr (Degree == 13) {
        p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
        p = p * r + 1.0 / 39916800.0;
        p = p * r + 1.0 / 3628800.0;
        p = p * r + 1.0 / 362880.0;
        p = p * r + 1.0 / 40320.0;
        p = p * r + 1.0 / 5040.0;
    } else {
        p = splat(1.0 / 5040.0);
    }
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    VecBits bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 1023) << 52;  // the sum's low bits hold n in two's complement; the shift drops all else
    Vec scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return x < -708.0 ? Vec{} : p * scale;
}

}  // namespace daemon_fast::cpu
