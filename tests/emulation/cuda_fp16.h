// Stand-in for CUDA's header of the same name. The conversion is done by hand: g++ 11 has no _Float16.
#pragma once

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
