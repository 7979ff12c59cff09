// Stand-in for CUDA's header of the same name.
#pragma once

struct __half {
    _Float16 value;
};

inline float __half2float(__half x) {
    return static_cast<float>(x.value);
}
