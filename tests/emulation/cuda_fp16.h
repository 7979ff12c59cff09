// Stand-in for CUDA's header of the same name. The conversion is done by hand: g++ 11 has no _Float16.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
    uint16_t bits;
};

inline float __half2float(__half x) {
    const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13, sign = (x.bits & 0x8000u) << 16;
    const bool finite = magnitude < 0x0f800000;
    const uint32_t wide = sign | magnitude | (finite ? 0 : 0x7f800000u);
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return finite ? value * 0x1p112f : value;  // an exponent is biased by 15 there and 127 here; exact, subnormals too
}

// To the nearest, ties to even: adding a power of two leaves 10 bits of the fraction, or what a subnormal has of them.
inline __half __float2half(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const float magnitude = std::fabs(x);
    if (x != x) return {0x7fff};
    if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
    int exponent;
    std::frexp(magnitude, &exponent);  // magnitude < 2^exponent
    if (magnitude < 0x1p-14f) exponent = -13;
    const float step = std::ldexp(1.0f, exponent - 11);
    const uint32_t steps = static_cast<uint32_t>(std::nearbyint(magnitude / step));  // up to 2^11
    return {static_cast<uint16_t>(sign | (static_cast<uint32_t>(exponent + 13) * 1024 + steps))};
}
