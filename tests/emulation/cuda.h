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
// - with the source, what CUB, the device's math functions and the compiler make of it: stand-ins with the same
//   interface, and CUB's order of operations, take their place (cub/, cuda_fp16.h and cuda_bf16.h in this folder). The
//   module's PTX (ptx.h) has all that as it ships, alignments and bounds of shared memory too, but no sanitizer;
// - occupancy, and the rounding of approximate instructions.
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
#include <stdexcept>
#include <string>
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

struct Fiber {
    ucontext_t start{};
    void* registers[5] = {};  // where it goes on
    std::unique_ptr<char[]> stack{new char[kStack]};
    void* fake_stack = nullptr;
    bool started = false, done = false;
    const char* waits = nullptr;  // the collective at which it waits, or null
    bool whole_block = false;     // for all threads of the block, or for the lanes in `mask`
    uint32_t mask = 0;
    uint64_t slot = 0;          // what it hands to the other lanes of its warp
    uint64_t seen[kWarp] = {};  // what they handed over
};

// Goes on at `to`, or at a fiber's start, until something comes back to `from`. Unlike swapcontext, without a system
// call. AddressSanitizer would take the jump for one out of the stack's frames, and forget what it watches there.
#define EMULATION_SWITCH [[gnu::noinline, gnu::no_sanitize("address")]] inline
EMULATION_SWITCH void jump(void** to) {
    __builtin_longjmp(to, 1);
}
EMULATION_SWITCH void switch_to(void** from, void** to, const ucontext_t* start) {
    if (__builtin_setjmp(from)) return;
    if (start) setcontext(start);
    jump(to);
}

class Block {
 public:
    // order: 0 ascending, 1 descending, both warp by warp; else the seed of a shuffle of all threads. What a kernel
    // does wrong is an exception.
    void run(unsigned threads, const std::function<void()>& body, int order) {
        body_ = &body;
        order_ = order;
        threads_ = threads;
        random_.seed(static_cast<unsigned>(order));
        while (fibers_.size() < threads) fibers_.push_back(std::make_unique<Fiber>());
        for (unsigned i = 0; i < threads; ++i) fibers_[i]->done = false;
        std::vector<unsigned> turn(threads);
        for (unsigned i = 0; i < threads; ++i) turn[i] = order == 1 ? threads - 1 - i : i;
        for (;;) {
            bool moved = false, left = false;
            if (order > 1) {
                std::shuffle(turn.begin(), turn.end(), random_);
                for (const unsigned i : turn) moved |= step(i);
                for (unsigned first = 0; first < threads; first += kWarp) moved |= release_warp(first);
            } else {  // one warp runs as far ahead of the others as it can
                for (unsigned begin = 0; begin < threads; begin += kWarp) {
                    const unsigned end = std::min(begin + kWarp, threads);
                    for (bool again = true; again; moved |= again) {
                        again = false;
                        for (unsigned i = begin; i < end; ++i) again |= step(turn[i]);
                        again |= release_warp(turn[begin] / kWarp * kWarp);
                        if (turn[end - 1] / kWarp != turn[begin] / kWarp)
                            again |= release_warp(turn[end - 1] / kWarp * kWarp);
                    }
                }
            }
            for (unsigned i = 0; i < threads; ++i) left |= !fibers_[i]->done;
            if (!left) return;
            if (!moved && !release_block()) stuck();
        }
    }

    void wait(const char* what, bool whole_block, uint32_t mask) {
        Fiber& fiber = me();
        fiber.waits = what;
        fiber.whole_block = whole_block;
        fiber.mask = mask;
        suspend();
    }

    // Hands a value to the lanes in `mask`, this one among them; returns what each handed over.
    const uint64_t* exchange(const char* what, uint32_t mask, uint64_t value) {
        if (!(mask >> (current_ % kWarp) & 1)) fail("a lane outside its own mask: ", what);
        me().slot = value;
        wait(what, false, mask);
        return me().seen;
    }

    // A barrier of the whole block; returns the sum of all its threads' values.
    int sum(const char* what, int value) {
        arriving_ += value;
        wait(what, true, 0);
        return sum_;
    }

    void interrupt() {
        if (order_ > 1 && random_() % 4 == 0) suspend();
    }

    // Ends the kernel, from inside a thread of it or from the scheduler.
    [[noreturn]] void fail(const std::string& what, const std::string& where = "") {
        failure_ = "emulated block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(current_) + ": " +
                   what + where;
        if (inside_) suspend();
        end();
    }

 private:
    static void enter();

    Fiber& me() { return *fibers_[current_]; }

    [[noreturn]] void end() {
        for (auto& fiber : fibers_) fiber.release();  // what they were in the middle of is lost, and its memory
        fibers_.clear();
        std::string what;
        what.swap(failure_);
        throw std::runtime_error(what);
    }

    void resume(unsigned i) {
        Fiber& fiber = *fibers_[i];
        current_ = i;
        threadIdx.x = i;
        inside_ = true;
        const ucontext_t* start = nullptr;
        if (!fiber.started) {
            getcontext(&fiber.start);
            fiber.start.uc_stack.ss_sp = fiber.stack.get();
            fiber.start.uc_stack.ss_size = kStack;
            makecontext(&fiber.start, &Block::enter, 0);
            fiber.started = true;
            start = &fiber.start;
        }
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(&main_fake_stack_, fiber.stack.get(), kStack);
#endif
        switch_to(main_, fiber.registers, start);
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(main_fake_stack_, nullptr, nullptr);
#endif
        inside_ = false;
        if (!failure_.empty()) end();
    }

    void suspend() {
        Fiber& fiber = me();
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(&fiber.fake_stack, main_stack_, main_stack_size_);
#endif
        switch_to(fiber.registers, main_, nullptr);
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
    }

    // Runs a thread until it waits or ends; false: it can't run.
    bool step(unsigned i) {
        if (fibers_[i]->done || fibers_[i]->waits) return false;
        resume(i);
        return true;
    }

    bool release_block() {
        unsigned arrived = 0, running = 0;
        const char* what = nullptr;
        for (unsigned i = 0; i < threads_; ++i) {
            const Fiber& fiber = *fibers_[i];
            running += !fiber.done;
            if (!fiber.waits || !fiber.whole_block) continue;
            if (what && std::strcmp(what, fiber.waits) != 0) fail("threads meet at different barriers: ", what);
            what = fiber.waits;
            ++arrived;
        }
        if (arrived == 0 || arrived < running) return false;
        if (running < threads_) fail("a barrier that other threads never reach: they have returned");
        for (unsigned i = 0; i < threads_; ++i) fibers_[i]->waits = nullptr;
        sum_ = arriving_;
        arriving_ = 0;
        return true;
    }

    // Lets those lanes go on that have met.
    bool release_warp(unsigned first) {
        bool released = false;
        for (unsigned i = first; i < std::min(first + kWarp, threads_); ++i) {
            const Fiber& fiber = *fibers_[i];
            if (!fiber.waits || fiber.whole_block || !complete(first, fiber)) continue;
            const uint32_t mask = fiber.mask;
            uint64_t slots[kWarp] = {};
            for (unsigned l = 0; l < kWarp; ++l)
                if (mask >> l & 1) slots[l] = fibers_[first + l]->slot;
            for (unsigned l = 0; l < kWarp; ++l) {
                if (!(mask >> l & 1)) continue;
                std::memcpy(fibers_[first + l]->seen, slots, sizeof slots);
                fibers_[first + l]->waits = nullptr;
            }
            released = true;
        }
        return released;
    }

    bool complete(unsigned first, const Fiber& fiber) {
        for (unsigned l = 0; l < kWarp; ++l) {
            if (!(fiber.mask >> l & 1)) continue;
            if (first + l >= threads_) fail("the mask names lanes that the block lacks: ", fiber.waits);
            const Fiber& other = *fibers_[first + l];
            if (other.done) fail("a lane of the mask has returned: ", fiber.waits);
            if (!other.waits || other.whole_block) return false;
            if (std::strcmp(other.waits, fiber.waits) != 0 || other.mask != fiber.mask)
                fail("lanes of a warp meet at different collectives: ", fiber.waits);
        }
        return true;
    }

    [[noreturn]] void stuck() {
        std::string where;
        for (unsigned i = 0; i < threads_; ++i)
            if (fibers_[i]->waits) where += "; thread " + std::to_string(i) + " at " + fibers_[i]->waits;
        fail("deadlock: threads wait for others that wait elsewhere", where);
    }

    std::vector<std::unique_ptr<Fiber>> fibers_;
    void* main_[5] = {};
#if defined(__SANITIZE_ADDRESS__)
    void* main_fake_stack_ = nullptr;
    const void* main_stack_ = nullptr;
    size_t main_stack_size_ = 0;
#endif
    unsigned current_ = 0, threads_ = 0;
    int order_ = 0, arriving_ = 0, sum_ = 0;
    bool inside_ = false;
    std::string failure_;
    std::mt19937 random_;
    const std::function<void()>* body_ = nullptr;
};

inline Block block;

// A fiber serves one block after the other.
inline void Block::enter() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &block.main_stack_, &block.main_stack_size_);
#endif
    for (;;) {
        (*block.body_)();
        block.me().done = true;
        block.suspend();
    }
}

[[noreturn]] inline void fail(const char* what) {
    block.fail(what);
}

// read(of) sees by of(lane) what each lane in `mask` handed over.
template <class Value, class Read>
auto exchange(const char* what, uint32_t mask, Value value, const Read& read) {
    static_assert(sizeof(Value) <= sizeof(uint64_t));
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    const uint64_t* const seen = block.exchange(what, mask, bits);
    return read([&](unsigned lane) {
        if (lane >= kWarp || !(mask >> lane & 1)) block.fail("reads a lane outside the mask: ", what);
        Value other;
        std::memcpy(&other, &seen[lane], sizeof other);
        return other;
    });
}

// op over the values of all lanes in `mask`.
template <class Value, class Op>
Value fold(const char* what, uint32_t mask, Value value, const Op& op) {
    return exchange(what, mask, value, [&](auto of) {
        unsigned lane = static_cast<unsigned>(__builtin_ctz(mask));
        Value result = of(lane);
        while (++lane < kWarp)
            if (mask >> lane & 1) result = op(result, of(lane));
        return result;
    });
}

// source(lane, first and last lane of its segment) is the lane to read; outside the segment, a lane reads its own.
template <class Value, class Source>
Value shuffle(const char* what, uint32_t mask, Value value, int width, const Source& source) {
    return exchange(what, mask, value, [&](auto of) {
        const int lane = static_cast<int>(threadIdx.x % kWarp), first = lane & ~(width - 1);
        const int from = source(lane, first);
        return of(static_cast<unsigned>(from < first || from >= first + width ? lane : from));
    });
}

inline std::unique_ptr<char[]> shared_memory;

// What a launch does; `kernel` is called by every thread.
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
    emulation::block.sum("__syncthreads", 0);
}
inline int __syncthreads_count(int predicate) {
    return emulation::block.sum("__syncthreads_count", predicate != 0);
}
inline int __syncthreads_or(int predicate) {
    return emulation::block.sum("__syncthreads_or", predicate != 0) != 0;
}
inline int __syncthreads_and(int predicate) {
    return emulation::block.sum("__syncthreads_and", predicate == 0) == 0;
}

inline void __syncwarp(uint32_t mask = ~0u) {
    emulation::block.exchange("__syncwarp", mask, 0);
}

template <class Value>
uint32_t __match_any_sync(uint32_t mask, Value value) {
    return emulation::exchange("__match_any_sync", mask, value, [&](auto of) {
        uint32_t bits = 0;
        for (unsigned lane = 0; lane < emulation::kWarp; ++lane)
            if (mask >> lane & 1) bits |= static_cast<uint32_t>(of(lane) == value) << lane;
        return bits;
    });
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
    const uint32_t bit = predicate ? 1u << threadIdx.x % emulation::kWarp : 0;
    return emulation::fold("__ballot_sync", mask, bit, [](uint32_t a, uint32_t b) { return a | b; });
}
inline int __any_sync(uint32_t mask, int predicate) {
    return emulation::fold("__any_sync", mask, int{predicate != 0}, [](int a, int b) { return a | b; });
}
inline int __all_sync(uint32_t mask, int predicate) {
    return emulation::fold("__all_sync", mask, int{predicate != 0}, [](int a, int b) { return a & b; });
}

#define EMULATION_REDUCE(name, Value, result)                                                                     \
    inline Value __reduce_##name##_sync(uint32_t mask, Value value) {                                             \
        return emulation::fold(                                                                                   \
            "__reduce_" #name "_sync", mask, value, [](Value a, Value b) { return static_cast<Value>(result); }); \
    }
EMULATION_REDUCE(add, uint32_t, a + b)
EMULATION_REDUCE(min, uint32_t, std::min(a, b))
EMULATION_REDUCE(max, uint32_t, std::max(a, b))
EMULATION_REDUCE(and, uint32_t, a& b)
EMULATION_REDUCE(or, uint32_t, a | b)
EMULATION_REDUCE(xor, uint32_t, a ^ b)
EMULATION_REDUCE(add, int32_t, static_cast<uint32_t>(a) + static_cast<uint32_t>(b))
EMULATION_REDUCE(min, int32_t, std::min(a, b))
EMULATION_REDUCE(max, int32_t, std::max(a, b))

template <class Value>
Value __shfl_sync(uint32_t mask, Value value, int lane, int width = 32) {
    return emulation::shuffle(
        "__shfl_sync", mask, value, width, [&](int, int first) { return first + (lane & (width - 1)); });
}
template <class Value>
Value __shfl_xor_sync(uint32_t mask, Value value, int distance, int width = 32) {
    return emulation::shuffle("__shfl_xor_sync", mask, value, width, [&](int self, int) { return self ^ distance; });
}
template <class Value>
Value __shfl_up_sync(uint32_t mask, Value value, int distance, int width = 32) {
    return emulation::shuffle("__shfl_up_sync", mask, value, width, [&](int self, int) { return self - distance; });
}
template <class Value>
Value __shfl_down_sync(uint32_t mask, Value value, int distance, int width = 32) {
    return emulation::shuffle("__shfl_down_sync", mask, value, width, [&](int self, int) { return self + distance; });
}

#define EMULATION_ATOMIC(name, Value, after)            \
    inline Value atomic##name(Value* at, Value value) { \
        emulation::block.interrupt();                   \
        const Value before = *at;                       \
        *at = static_cast<Value>(after);                \
        return before;                                  \
    }
EMULATION_ATOMIC(Add, uint32_t, before + value)
EMULATION_ATOMIC(Add, int32_t, before + value)
EMULATION_ATOMIC(Add, float, before + value)
EMULATION_ATOMIC(Add, double, before + value)
EMULATION_ATOMIC(Or, uint32_t, before | value)
EMULATION_ATOMIC(And, uint32_t, before& value)
EMULATION_ATOMIC(Min, uint32_t, std::min(before, value))
EMULATION_ATOMIC(Max, uint32_t, std::max(before, value))
EMULATION_ATOMIC(Exch, uint32_t, value)

inline uint32_t atomicCAS(uint32_t* at, uint32_t expected, uint32_t desired) {
    emulation::block.interrupt();
    const uint32_t before = *at;
    if (before == expected) *at = desired;
    return before;
}

inline int __popc(uint32_t value) {
    return __builtin_popcount(value);
}

inline int __clz(uint32_t value) {
    return value ? __builtin_clz(value) : 32;
}

inline int __ffs(int value) {
    return __builtin_ffs(value);
}

using std::max;
using std::min;

inline int32_t __float_as_int(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float __int_as_float(int32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

inline uint2 make_uint2(uint32_t x, uint32_t y) {
    return {x, y};
}
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
    return {x, y, z, w};
}
inline float2 make_float2(float x, float y) {
    return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}

template <class Value>
Value __ldg(const Value* at) {
    return *at;
}
