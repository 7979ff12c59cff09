// The pass over a row of logits that token_logprobs and sample_tokens share.
//
// Each thread keeps a running maximum and the sums of exp(x - max) and exp((x - max) / temperature) of what it has
// seen, in float32; the block merges them. One maximum serves both, dividing by a temperature being monotone.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/device.cuh"

namespace daemon_fast::cuda {

struct LogSums {
    float max, plain, tempered;
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

__device__ __forceinline__ float minus_infinity_float() {
    return __int_as_float(static_cast<int32_t>(0xff800000u));
}

constexpr float kLog2E = 1.44269504f;  // its rounding is harmless: it multiplies differences to the maximum

// Brings `sums` to a new maximum, not below its own.
template <bool kTempered>
__device__ __forceinline__ void rescale(LogSums& sums, float max, float inverse) {
    const float down = (sums.max - max) * kLog2E;
    if (sums.max != minus_infinity_float()) {
        sums.plain *= exp2f(down);
        if (kTempered) sums.tempered *= exp2f(down * inverse);
    }
    sums.max = max;
}

template <bool kTempered, int kCount>
__device__ __forceinline__ void add(LogSums& sums, const float (&x)[kCount], float inverse) {
    float max = x[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) max = fmaxf(max, x[i]);
    if (max > sums.max) rescale<kTempered>(sums, max, inverse);
    if (sums.max == minus_infinity_float()) {
        // Only -inf so far, which adds nothing, and NaN, which fmaxf drops.
#pragma unroll
        for (int i = 0; i < kCount; ++i)
            if (x[i] != x[i]) sums.plain = sums.tempered = x[i];
        return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        const float down = (x[i] - sums.max) * kLog2E;
        sums.plain += exp2f(down);
        if (kTempered) sums.tempered += exp2f(down * inverse);
    }
}

template <bool kTempered>
struct Merge {
    float inverse;
    __device__ LogSums operator()(LogSums a, LogSums b) const {
        if (a.max < b.max) {
            const LogSums lower = a;
            a = b;
            b = lower;
        }
        if (b.max == minus_infinity_float()) {
            a.plain += b.plain;  // 0, or NaN
            a.tempered += b.tempered;
            return a;
        }
        rescale<kTempered>(b, a.max, inverse);
        a.plain += b.plain;
        if (kTempered) a.tempered += b.tempered;
        return a;
    }
};

template <class Logit>
struct alignas(16) Vector {
    static constexpr int kCount = 16 / sizeof(Logit);
    Logit x[kCount];
};

// visit(first id, values) for all of a row, each thread its share: 16 bytes at a time, and what lies before the first
// and behind the last 16-byte boundary one by one, since rows may start anywhere. kInFlight: loads before the first
// use.
template <int kInFlight, class Logit, class Visit>
__device__ __forceinline__ void walk_row(const Logit* row, int64_t V, const Visit& visit) {
    using Wide = Vector<Logit>;
    const uintptr_t misaligned = reinterpret_cast<uintptr_t>(row) % sizeof(Wide);
    int64_t head = misaligned ? static_cast<int64_t>((sizeof(Wide) - misaligned) / sizeof(Logit)) : 0;
    if (head > V) head = V;
    const int64_t wide_count = (V - head) / Wide::kCount;
    const auto single = [&](int64_t i) {
        const float x[1] = {to_float(row[i])};
        visit(i, x);
    };
    for (int64_t i = threadIdx.x; i < head; i += blockDim.x) single(i);
    const Wide* const wide = reinterpret_cast<const Wide*>(row + head);
    for (int64_t begin = threadIdx.x; begin < wide_count; begin += kInFlight * blockDim.x) {
        Wide loaded[kInFlight];
#pragma unroll
        for (int n = 0; n < kInFlight; ++n)
            if (begin + n * blockDim.x < wide_count) loaded[n] = wide[begin + n * blockDim.x];
#pragma unroll
        for (int n = 0; n < kInFlight; ++n) {
            if (begin + n * blockDim.x >= wide_count) break;
            float x[Wide::kCount];
#pragma unroll
            for (int i = 0; i < Wide::kCount; ++i) x[i] = to_float(loaded[n].x[i]);
            visit(head + (begin + n * blockDim.x) * Wide::kCount, x);
        }
    }
    for (int64_t i = head + wide_count * Wide::kCount + threadIdx.x; i < V; i += blockDim.x) single(i);
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

template <class Logit, bool kTempered>
__device__ LogSums scan_row(const Logit* row, int64_t V, float inverse) {
    LogSums sums{minus_infinity_float(), 0, 0};
    walk_row<4>(row, V, [&](int64_t, const auto& x) { add<kTempered>(sums, x, inverse); });
    return sums;
}

}  // namespace daemon_fast::cuda
