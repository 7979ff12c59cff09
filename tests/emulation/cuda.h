// Just enough of CUDA to run one block of a device function on the CPU: each CUDA thread is a thread of its own,
// barriers are barriers and atomics are atomics, so the shipped device code runs unchanged and truly in parallel.
//
// Caught: wrong indices and results, missing initialisation, deadlocks from a barrier not all threads reach, and (by
// luck of the schedule only) missing barriers. Not caught: anything about warps, launch geometry, memory spaces,
// alignment rules of the GPU, or its memory model.
#pragma once

#include <algorithm>
#include <barrier>
#include <cstdint>
#include <thread>
#include <vector>

#define __device__
#define __host__

struct Dim {
    unsigned x;
};

inline thread_local Dim threadIdx, blockDim;
inline thread_local std::barrier<>* block_barrier;

inline void __syncthreads() {
    block_barrier->arrive_and_wait();
}

inline uint32_t atomicCAS(uint32_t* at, uint32_t expected, uint32_t desired) {
    __atomic_compare_exchange_n(at, &expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}

inline uint32_t atomicAdd(uint32_t* at, uint32_t value) {
    return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}

template <class Body>
void run_block(unsigned threads, const Body& body) {
    std::barrier<> barrier(threads);
    std::vector<std::thread> pool;
    for (unsigned i = 0; i < threads; ++i)
        pool.emplace_back([&, i] {
            threadIdx = {i};
            blockDim = {threads};
            block_barrier = &barrier;
            body();
        });
    for (std::thread& thread : pool) thread.join();
}
