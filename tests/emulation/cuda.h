// Just enough of CUDA to run the shipped kernels on the CPU, unchanged, under the tests and the sanitizers.
//
// Each CUDA thread is a fiber with a stack of its own. One runs at a time, until it meets a barrier, a warp collective
// or the end; what runs next is the order's choice: the first or the last warp as far ahead as it can get, or all
// threads shuffled by a seed, which also interrupts them at atomics. Blocks run one after the other.
//
// Caught
// - wrong indices, results and initial values: shared memory starts as garbage, dynamic shared memory is allocated to
//   the byte, and AddressSanitizer and UndefinedBehaviorSanitizer watch every access;
// - missing barriers: a thread runs on until something stops it, so that what it should have waited for has not been
//   written yet in one order or another (the tests run several); that is surer than truly parallel threads, which
//   mostly happen to come in time;
// - barriers and collectives that not all threads reach, or that the lanes of a warp meet in different places: an error
//   that names them, not a hang;
// - results that depend on the order of atomics.
//
// Not caught
// - the GPU's weak memory order (here every access is seen at once by all), data races within one stretch between
//   barriers that no order of whole stretches shows, and anything between blocks that run at the same time;
// - memory spaces, alignment of vector loads (UBSan sees some), registers, occupancy, launch limits, streams;
// - CUB and the device's math functions: stand-ins of the same interface take their place (cub/, cuda_fp16.h and
//   cuda_bf16.h in this folder), so that only our use of them is tested.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __restrict__
#define __shared__ static
#define __launch_bounds__(...)

struct Dim {
    unsigned x = 1, y = 1, z = 1;
};

inline Dim threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr size_t kStack = 256 * 1024;
constexpr unsigned kWarp = 32;

[[noreturn]] inline void fail(const char* what, const char* where = "") {
    std::fprintf(stderr, "emulated block %u, thread %u: %s%s\n", blockIdx.x, threadIdx.x, what, where);
    std::abort();
}

struct Fiber {
    ucontext_t context{};
    std::unique_ptr<char[]> stack{new char[kStack]};
    void* fake_stack = nullptr;
    bool done = false;
    const char* waits = nullptr;  // the collective at which it waits, or null
    bool whole_block = false;     // for all threads of the block, or for the lanes in `mask`
    uint32_t mask = 0;
    uint64_t slot = 0;  // what it hands to the other lanes of its warp
};

class Block {
 public:
    // order: 0 ascending, 1 descending, both warp by warp; else the seed of a shuffle of all threads
    void run(unsigned threads, const std::function<void()>& body, int order) {
        body_ = &body;
        order_ = order;
        random_.seed(static_cast<unsigned>(order));
        fibers_ = std::vector<Fiber>(threads);
        for (Fiber& fiber : fibers_) {
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = kStack;
            makecontext(&fiber.context, &Block::enter, 0);
        }
        std::vector<unsigned> turn(threads);
        for (unsigned i = 0; i < threads; ++i) turn[i] = order == 1 ? threads - 1 - i : i;
        for (;;) {
            bool moved = false, left = false;
            if (order > 1) {
                std::shuffle(turn.begin(), turn.end(), random_);
                moved = step(turn.begin(), turn.end());
            } else {  // one warp runs as far ahead of the others as it can
                for (auto warp = turn.begin(); warp != turn.end();) {
                    const auto end = warp + std::min<std::ptrdiff_t>(kWarp, turn.end() - warp);
                    while (step(warp, end)) moved = true;
                    warp = end;
                }
            }
            for (const Fiber& fiber : fibers_) left |= !fiber.done;
            if (!left) return;
            if (!moved && !release_block()) stuck();
        }
    }

    void wait(const char* what, bool whole_block, uint32_t mask) {
        Fiber& fiber = fibers_[current_];
        fiber.waits = what;
        fiber.whole_block = whole_block;
        fiber.mask = mask;
        suspend();
    }

    void interrupt() {
        if (order_ > 1 && random_() % 4 == 0) suspend();
    }

    Fiber& me() { return fibers_[current_]; }
    Fiber& lane(unsigned i) { return fibers_[current_ / kWarp * kWarp + i]; }
    unsigned lanes() const {
        return std::min<unsigned>(kWarp, static_cast<unsigned>(fibers_.size()) - current_ / kWarp * kWarp);
    }

 private:
    static void enter();

    void resume(unsigned i) {
        current_ = i;
        threadIdx.x = i;
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(&main_fake_stack_, fibers_[i].stack.get(), kStack);
#endif
        swapcontext(&main_, &fibers_[i].context);
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(main_fake_stack_, nullptr, nullptr);
#endif
    }

    void suspend() {
        Fiber& fiber = fibers_[current_];
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fiber.fake_stack, main_stack_, main_stack_size_);
#endif
        swapcontext(&fiber.context, &main_);
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
    }

    // Runs each of these threads until it waits or ends, then lets those go on whose warp has met; false: none could
    // run.
    template <class Turn>
    bool step(Turn begin, Turn end) {
        bool moved = false;
        for (auto i = begin; i != end; ++i) {
            if (fibers_[*i].done || fibers_[*i].waits) continue;
            resume(*i);
            moved = true;
        }
        return release_warps() || moved;
    }

    bool release_block() {
        size_t arrived = 0, running = 0;
        for (const Fiber& fiber : fibers_) {
            running += !fiber.done;
            arrived += fiber.waits && fiber.whole_block;
        }
        if (arrived == 0 || arrived < running) return false;
        if (running < fibers_.size()) fail("a barrier that other threads never reach: they have returned");
        for (Fiber& fiber : fibers_) fiber.waits = nullptr;
        return true;
    }

    bool release_warps() {
        bool released = false;
        for (size_t first = 0; first < fibers_.size(); first += kWarp) {
            for (size_t i = first; i < std::min(first + kWarp, fibers_.size()); ++i) {
                const Fiber& fiber = fibers_[i];
                if (!fiber.waits || fiber.whole_block || !complete(first, fiber)) continue;
                const uint32_t mask = fiber.mask;
                for (unsigned l = 0; l < kWarp; ++l)
                    if (mask >> l & 1) fibers_[first + l].waits = nullptr;
                released = true;
            }
        }
        return released;
    }

    bool complete(size_t first, const Fiber& fiber) {
        for (unsigned l = 0; l < kWarp; ++l) {
            if (!(fiber.mask >> l & 1)) continue;
            if (first + l >= fibers_.size()) fail("the mask names lanes that the block lacks: ", fiber.waits);
            const Fiber& other = fibers_[first + l];
            if (other.done) fail("a lane of the mask has returned: ", fiber.waits);
            if (!other.waits || other.whole_block) return false;
            if (std::strcmp(other.waits, fiber.waits) != 0 || other.mask != fiber.mask)
                fail("lanes of a warp meet at different collectives: ", fiber.waits);
        }
        return true;
    }

    [[noreturn]] void stuck() {
        for (size_t i = 0; i < fibers_.size(); ++i)
            if (fibers_[i].waits) std::fprintf(stderr, "thread %zu waits at %s\n", i, fibers_[i].waits);
        fail("deadlock: threads wait for others that wait elsewhere");
    }

    std::vector<Fiber> fibers_;
    ucontext_t main_{};
#if defined(__SANITIZE_ADDRESS__)
    void* main_fake_stack_ = nullptr;
    const void* main_stack_ = nullptr;
    size_t main_stack_size_ = 0;
#endif
    unsigned current_ = 0;
    int order_ = 0;
    std::mt19937 random_;
    const std::function<void()>* body_ = nullptr;
};

inline Block block;

inline void Block::enter() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &block.main_stack_, &block.main_stack_size_);
#endif
    (*block.body_)();
    block.me().done = true;
    block.suspend();
}

// Hands `value` to the other lanes; `read` sees what all handed over.
template <class Value, class Read>
auto exchange(const char* what, uint32_t mask, Value value, Read read) {
    static_assert(sizeof(Value) <= sizeof(uint64_t));
    if (!(mask >> (threadIdx.x % kWarp) & 1)) fail("a lane outside its own mask: ", what);
    std::memcpy(&block.me().slot, &value, sizeof value);
    block.wait(what, false, mask);
    const auto result = read([](unsigned lane) {
        Value other;
        std::memcpy(&other, &block.lane(lane).slot, sizeof other);
        return other;
    });
    block.wait(what, false, mask);  // nobody writes its slot again before all have read
    return result;
}

inline std::unique_ptr<char[]> shared_memory;

// What kernel<<<grid, threads, shared_bytes>>>(...) does; `kernel` is called by every thread.
inline void launch(
    unsigned grid, unsigned threads, size_t shared_bytes, int order, const std::function<void()>& kernel) {
    gridDim.x = grid;
    blockDim.x = threads;
    for (unsigned b = 0; b < grid; ++b) {
        blockIdx.x = order == 1 ? grid - 1 - b : b;
        shared_memory.reset(new char[shared_bytes]);
        std::memset(shared_memory.get(), 0xab, shared_bytes);
        block.run(threads, kernel, order);
    }
}

}  // namespace emulation

inline void __syncthreads() {
    emulation::block.wait("__syncthreads", true, 0);
}

inline void __syncwarp(uint32_t mask = ~0u) {
    emulation::block.wait("__syncwarp", false, mask);
}

inline uint32_t __ballot_sync(uint32_t mask, bool predicate) {
    return emulation::exchange("__ballot_sync", mask, predicate, [&](auto of) {
        uint32_t bits = 0;
        for (unsigned lane = 0; lane < emulation::block.lanes(); ++lane)
            if (mask >> lane & 1) bits |= static_cast<uint32_t>(of(lane)) << lane;
        return bits;
    });
}

template <class Value>
uint32_t __match_any_sync(uint32_t mask, Value value) {
    return emulation::exchange("__match_any_sync", mask, value, [&](auto of) {
        uint32_t bits = 0;
        for (unsigned lane = 0; lane < emulation::block.lanes(); ++lane)
            if (mask >> lane & 1) bits |= static_cast<uint32_t>(of(lane) == value) << lane;
        return bits;
    });
}

template <class Value>
Value __shfl_sync(uint32_t mask, Value value, int source) {
    return emulation::exchange("__shfl_sync", mask, value, [&](auto of) { return of(static_cast<unsigned>(source)); });
}

template <class Value>
Value __shfl_xor_sync(uint32_t mask, Value value, int distance) {
    const unsigned source = threadIdx.x % emulation::kWarp ^ static_cast<unsigned>(distance);
    return emulation::exchange("__shfl_xor_sync", mask, value, [&](auto of) { return of(source); });
}

inline uint32_t __reduce_add_sync(uint32_t mask, uint32_t value) {
    return emulation::exchange("__reduce_add_sync", mask, value, [&](auto of) {
        uint32_t sum = 0;
        for (unsigned lane = 0; lane < emulation::block.lanes(); ++lane)
            if (mask >> lane & 1) sum += of(lane);
        return sum;
    });
}

inline uint32_t atomicMax(uint32_t* at, uint32_t value) {
    emulation::block.interrupt();
    const uint32_t before = *at;
    *at = std::max(before, value);
    return before;
}

inline uint32_t atomicCAS(uint32_t* at, uint32_t expected, uint32_t desired) {
    emulation::block.interrupt();
    const uint32_t before = *at;
    if (before == expected) *at = desired;
    return before;
}

inline uint32_t atomicAdd(uint32_t* at, uint32_t value) {
    emulation::block.interrupt();
    const uint32_t before = *at;
    *at += value;
    return before;
}

inline uint32_t atomicOr(uint32_t* at, uint32_t value) {
    emulation::block.interrupt();
    const uint32_t before = *at;
    *at |= value;
    return before;
}

using std::max;
using std::min;

inline int __popc(uint32_t value) {
    return __builtin_popcount(value);
}

inline int __clz(uint32_t value) {
    return value ? __builtin_clz(value) : 32;
}

inline float __int_as_float(int32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline int32_t __float_as_int(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
    return {x, y, z, w};
}

template <class Value>
Value __ldg(const Value* at) {
    return *at;
}
