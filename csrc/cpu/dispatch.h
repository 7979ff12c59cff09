// Every CPU kernel body is compiled twice from one source: for any x86-64 and for AVX2. The choice is made at
// run time, so that one binary serves both. (AVX-512 was measured too: no faster for these kernels.)
#pragma once

#include <cstdlib>
#include <cstring>

#define DAEMON_FAST_INLINE inline __attribute__((always_inline))
#define DAEMON_FAST_INLINE_LAMBDA __attribute__((always_inline))

namespace daemon_fast::cpu {

#if defined(__x86_64__)
#define DAEMON_FAST_AVX2 __attribute__((target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt"), noinline))
#else
#define DAEMON_FAST_AVX2 __attribute__((noinline))
#endif

// DAEMON_FAST_CPU=baseline, set before the first call, forbids the AVX2 code; the tests compare the two.
inline bool use_avx2() {
#if defined(__x86_64__)
    static const bool use = [] {
        const char* wish = std::getenv("DAEMON_FAST_CPU");
        if (wish && std::strcmp(wish, "baseline") == 0) return false;
        // Every CPU with these three has the rest too, and clang 14 to 16 can't ask for f16c and lzcnt.
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    }();
    return use;
#else
    return false;
#endif
}

template <class Body>
DAEMON_FAST_AVX2 void run_avx2(const Body& body) {
    body();
}

template <class Body>
__attribute__((noinline)) void run_baseline(const Body& body) {
    body();
}

// `body` and all that it calls must be always_inline, or they are compiled for the baseline only.
template <class Body>
void dispatch(const Body& body) {
    if (use_avx2())
        run_avx2(body);
    else
        run_baseline(body);
}

}  // namespace daemon_fast::cpu
