// Device helpers that several kernels share. No torch in any .cuh file: the tests compile them with g++ too, and run
// the kernels on the CPU (tests/emulation).
#pragma once

#include <cstdint>
#include <cstring>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
#include <cub/warp/warp_reduce.cuh>
#include <cub/warp/warp_scan.cuh>
#include <type_traits>

namespace daemon_fast::cuda {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

// What launch passes as the size of dynamic shared memory, 16-byte aligned.
__device__ __forceinline__ char* dynamic_shared() {
#if defined(__CUDACC__)
    extern __shared__ __align__(16) char memory[];
    return memory;
#else
    return emulation::shared_memory.get();
#endif
}

__host__ __device__ constexpr int64_t align16(int64_t bytes) {
    return (bytes + 15) / 16 * 16;
}

__device__ __forceinline__ float nan_float() {
    return __int_as_float(0x7fc00000);
}

__device__ __forceinline__ double nan_double() {
    return static_cast<double>(nan_float());
}

__device__ __forceinline__ double minus_infinity() {
    return static_cast<double>(__int_as_float(static_cast<int32_t>(0xff800000u)));
}

__device__ __forceinline__ bool is_finite(double x) {
    return x - x == 0.0;
}

// fmax drops NaN; here it wins, and is seen at the end.
struct MaxOrNan {
    __device__ double operator()(double a, double b) const { return a > b || a != a ? a : b; }
};

struct Min {
    __device__ double operator()(double a, double b) const { return a < b ? a : b; }
};

struct Sum {
    __device__ double operator()(double a, double b) const { return a + b; }
};

// A reduction over the 32 lanes of a full warp, whose result every lane gets.
template <class Op>
__device__ __forceinline__ double reduce_warp(double value, Op op) {
    typename cub::WarpReduce<double>::TempStorage none;  // empty: full warps use shuffles
    value = cub::WarpReduce<double>(none).Reduce(value, op);
    return __shfl_sync(kAllLanes, value, 0);
}

// The maximum of the 32 lanes, or NaN if one has it, for every lane: as two integers, whose reduction is an
// instruction.
__device__ __forceinline__ double reduce_max(double value) {
    // Reversed where negative, doubles are ordered as integers are, and the NaN of nan_double above all.
    const auto as_ordered = [](uint64_t bits) {
        return bits ^ static_cast<uint64_t>(static_cast<int64_t>(bits) >> 63) >> 1;
    };
    if (value != value) value = nan_double();
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits = as_ordered(bits);
    const int32_t own = static_cast<int32_t>(bits >> 32), high = __reduce_max_sync(kAllLanes, own);
    const uint32_t low = __reduce_max_sync(kAllLanes, own == high ? static_cast<uint32_t>(bits) : 0u);
    bits = as_ordered(static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 | low);
    memcpy(&value, &bits, sizeof bits);
    return value;
}

__device__ __forceinline__ int lowest_bit(uint32_t bits) {
    return kWarp - 1 - __clz(bits & (~bits + 1));
}

// Which of 32 shares, one a lane, an inverse CDF meets.
struct Pick {
    int lane;     // the first that lifts the running sum above the target; else the last of all that are above 0, or -1
    bool passed;  // whether the target was passed
    double rest;  // the target, less all before `lane`
};

// Of the lanes up to each.
__device__ __forceinline__ double running_sums(double value) {
    typename cub::WarpScan<double>::TempStorage none;  // empty: full warps use shuffles
    double sum;
    cub::WarpScan<double>(none).InclusiveSum(value, sum);
    return sum;
}

__device__ __forceinline__ double last_lane(double value) {
    return __shfl_sync(kAllLanes, value, kWarp - 1);
}

// running: of the shares, by running_sums.
__device__ __forceinline__ Pick pick(double share, double running, double target) {
    const uint32_t possible = __ballot_sync(kAllLanes, share > 0);
    const uint32_t above = __ballot_sync(kAllLanes, share > 0 && running > target);
    const int lane = above ? lowest_bit(above) : kWarp - 1 - __clz(possible);
    const double before = __shfl_sync(kAllLanes, running - share, lane < 0 ? 0 : lane);
    return {lane, above != 0, target - before};
}

// A block-wide reduction whose result every thread gets.
template <int kThreads>
class Reduction {
 public:
    using Block = cub::BlockReduce<double, kThreads>;
    struct Storage {
        typename Block::TempStorage reduce;
        double result;
    };

    explicit __device__ Reduction(Storage& storage) : storage_(storage) {}

    template <class Op>
    __device__ double operator()(double value, Op op) {
        value = Block(storage_.reduce).Reduce(value, op);
        if (threadIdx.x == 0) storage_.result = value;
        __syncthreads();
        value = storage_.result;
        __syncthreads();  // the next reduction overwrites the storage
        return value;
    }

 private:
    Storage& storage_;
};

}  // namespace daemon_fast::cuda
