// The pass over a row of logits that token_logprobs and sample_tokens share.
//
// Each thread keeps a maximum and the sums of exp(x - max) and exp((x - max) / temperature) of what it has seen, in
// float32; warps and then the block merge them. One maximum serves both, dividing by a temperature being monotone, and
// it is looked at once for a batch of values.
//
// At a temperature, exponentials limit the pass: a multiprocessor's special function units give 16 a cycle, so that two
// an element take longer than reading 2 bytes. Its FMA units have time left, and compute a part of them as polynomials.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "cuda/device.cuh"

namespace daemon_fast::cuda {

constexpr int kLogitLoads = 4;  // 16-byte loads in flight of a thread, 32 values of 2 bytes: one batch

// Of 8 exponentials at the temperature, how many are polynomials: with 3, instructions and special functions of 2-byte
// logits take about equally long. Reading float32 takes longer than either.
template <class Logit>
constexpr int kPolynomials = sizeof(Logit) == 2 ? 3 : 0;

// max is finite but for +inf: where nothing but -inf has been seen, the sums are 0 (or NaN, if a NaN has).
struct LogSums {
    float max, plain, tempered;
};

constexpr float kLog2E = 1.44269504f;  // its rounding is harmless: it multiplies differences to the maximum

struct Temperature {
    float inverse;
    float scale;   // log2(e) / temperature
    float lowest;  // where 2^(x * scale) leaves the normal numbers, and never -inf

    explicit Temperature(double temperature)
        : inverse(static_cast<float>(1.0 / temperature)),
          scale(static_cast<float>(1.4426950408889634 / temperature)),
          lowest(static_cast<float>(std::max(-126 * 0.6931471805599453 * temperature, -3e38))) {}
};

__device__ __forceinline__ float to_float(float x) {
    return x;
}
__device__ __forceinline__ float to_float(__half x) {
    return __half2float(x);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
    return __bfloat162float(x);
}

template <class Value>
__device__ __forceinline__ Value from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16(x);
}

constexpr float kLowest = -3.402823466e38f;

__device__ __forceinline__ LogSums no_sums() {
    return {kLowest, 0, 0};
}

// 2^x to 2 units in the last place; what is below 2^-126 becomes 0.
__device__ __forceinline__ float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

// exp(x / temperature) for x <= 0 without the special function unit: 2^n as exponent bits, the rest by a polynomial.
// What is below 2^-126, and NaN, becomes 2^-126.
__device__ __forceinline__ float polynomial_exp(float x, const Temperature& temperature) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the last bits
    x = fmaxf(x, temperature.lowest);
    const float rounded = fmaf(x, temperature.scale, kRound);
    const float f = fmaf(x, temperature.scale, kRound - rounded);
    float y = 1.326472731e-3f;  // minimax on [-1/2, 1/2], relative error 1e-7
    y = fmaf(y, f, 9.671512991e-3f);
    y = fmaf(y, f, 5.550733581e-2f);
    y = fmaf(y, f, 0.2402224243f);
    y = fmaf(y, f, 0.6931470037f);
    y = fmaf(y, f, 1.0f);
    const uint32_t exponent = static_cast<uint32_t>(__float_as_int(rounded)) << 23;
    return __int_as_float(__float_as_int(y) + static_cast<int32_t>(exponent));
}

// Adds values to the sums.
template <bool kTempered, int kPolynomials, int kCount>
__device__ __forceinline__ void add(LogSums& sums, const float (&x)[kCount], const Temperature& temperature) {
    float max = sums.max;  // NaN is dropped here, and shows in `plain`
#pragma unroll
    for (int i = 0; i < kCount; ++i) max = fmaxf(max, x[i]);
    if (max > sums.max) {
        sums.plain *= fast_exp2((sums.max - max) * kLog2E);
        if (kTempered) sums.tempered *= fast_exp2((sums.max - max) * temperature.scale);
        sums.max = max;
    }
    float plain = 0, tempered = 0;  // of these alone: less rounding than adding each to the whole
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        const float down = x[i] - max;
        plain += fast_exp2(down * kLog2E);
        if (kTempered)
            tempered += i % 8 < kPolynomials ? polynomial_exp(down, temperature) : fast_exp2(down * temperature.scale);
    }
    sums.plain += plain;
    if (kTempered) sums.tempered += tempered;
}

// Of the 32 lanes, for each of them.
template <bool kTempered>
__device__ __forceinline__ LogSums merge_warp(LogSums sums, const Temperature& temperature) {
    float max = sums.max;
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
        max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, distance));
    sums.plain *= fast_exp2((sums.max - max) * kLog2E);
    if (kTempered) sums.tempered *= fast_exp2((sums.max - max) * temperature.scale);
    sums.max = max;
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        sums.plain += __shfl_xor_sync(kAllLanes, sums.plain, distance);
        if (kTempered) sums.tempered += __shfl_xor_sync(kAllLanes, sums.tempered, distance);
    }
    if (!(sums.plain > 0)) sums.tempered = sums.plain;  // polynomials see neither NaN nor that all are -inf
    return sums;
}

// Of the block, for each of the first warp's threads. The storage is free again behind a barrier.
template <bool kTempered, int kThreads>
__device__ __forceinline__ LogSums
merge_block(LogSums sums, const Temperature& temperature, LogSums (&storage)[kThreads / kWarp]) {
    sums = merge_warp<kTempered>(sums, temperature);
    if (threadIdx.x % kWarp == 0) storage[threadIdx.x / kWarp] = sums;
    __syncthreads();
    if (threadIdx.x < kWarp)
        sums = merge_warp<kTempered>(threadIdx.x < kThreads / kWarp ? storage[threadIdx.x] : no_sums(), temperature);
    return sums;
}

template <class Logit>
struct alignas(16) Vector {
    static constexpr int kCount = 16 / sizeof(Logit);
    Logit x[kCount];
};

template <class Logit>
__device__ __forceinline__ void widen(const Vector<Logit>& from, float* to) {
#pragma unroll
    for (int i = 0; i < Vector<Logit>::kCount; ++i) to[i] = to_float(from.x[i]);
}
// A bfloat16 is the upper half of a float32: one instruction each, two from a word.
__device__ __forceinline__ void widen(const Vector<__nv_bfloat16>& from, float* to) {
    uint32_t words[4];
    memcpy(words, &from, sizeof words);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        to[2 * i] = __int_as_float(static_cast<int32_t>(words[i] << 16));
        to[2 * i + 1] = __int_as_float(static_cast<int32_t>(words[i] & 0xffff0000u));
    }
}

// visit(first, values) for all of a row, each of kThreads threads its share: batches of kLoads * 16 bytes, loaded
// before the first use; what is left 16 bytes at a time; and what lies before the first and behind the last 16-byte
// boundary one by one, since rows may start anywhere. The ids of the values are first, first + 1, ...; in a batch of
// several loads, those of each load begin kThreads loads behind the one before.
template <int kLoads, int kThreads, class Logit, class Visit>
__device__ __forceinline__ void walk_row(const Logit* row, int V, int thread, const Visit& visit) {
    using Wide = Vector<Logit>;
    constexpr int kCount = Wide::kCount;
    const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(row) % sizeof(Wide));
    int head = misaligned ? (static_cast<int>(sizeof(Wide)) - misaligned) / static_cast<int>(sizeof(Logit)) : 0;
    if (head > V) head = V;
    const int wide_count = (V - head) / kCount;
    const auto single = [&](int i) {
        const float x[1] = {to_float(row[i])};
        visit(i, x);
    };
    const auto batch = [&](int first, auto loads) {
        Wide loaded[loads.value];
        float x[loads.value * kCount];
        const Wide* const wide = reinterpret_cast<const Wide*>(row + head) + first;
#pragma unroll
        for (int n = 0; n < loads.value; ++n) loaded[n] = wide[n * kThreads];
#pragma unroll
        for (int n = 0; n < loads.value; ++n) widen(loaded[n], x + n * kCount);
        visit(head + first * kCount, x);
    };
    int first = thread;
    for (; first - thread + kLoads * kThreads <= wide_count; first += kLoads * kThreads)
        batch(first, std::integral_constant<int, kLoads>());
#pragma unroll 1
    for (; first < wide_count; first += kThreads) batch(first, std::integral_constant<int, 1>());
#pragma unroll 1
    for (int i = thread; i < head; i += kThreads) single(i);
#pragma unroll 1
    for (int i = head + wide_count * kCount + thread; i < V; i += kThreads) single(i);
}

// What a visit of walk_row computed of its ids: 16 bytes at a time where `to` allows it, as in a row of the same
// layout.
template <class Logit, int kCount>
__device__ __forceinline__ void store(Logit* to, const float (&x)[kCount]) {
    using Wide = Vector<Logit>;
    if (kCount == Wide::kCount && reinterpret_cast<uintptr_t>(to) % sizeof(Wide) == 0) {
        Wide wide;
#pragma unroll
        for (int i = 0; i < kCount; ++i) wide.x[i] = from_float<Logit>(x[i]);
        *reinterpret_cast<Wide*>(to) = wide;
        return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = from_float<Logit>(x[i]);
}

// What each of kThreads threads sees of a row.
template <class Logit, bool kTempered, int kThreads>
__device__ __forceinline__ LogSums scan_row(const Logit* row, int V, int thread, const Temperature& temperature) {
    LogSums sums = no_sums();
    walk_row<kLogitLoads, kThreads>(
        row, V, thread, [&](int, const auto& x) { add<kTempered, kPolynomials<Logit>>(sums, x, temperature); });
    return sums;
}

}  // namespace daemon_fast::cuda
