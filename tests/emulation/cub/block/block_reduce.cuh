// Stand-in for CUB's header of the same name: same interface, same duties of the caller (only thread 0 gets the result;
// the storage is used again only behind a barrier) and same order of operations, so that rounding is the same too.
#pragma once

#include "cuda.h"

namespace cub {

template <class Value, int kThreads>
class BlockReduce {
 public:
    struct TempStorage {
        Value values[kThreads];
    };

    explicit BlockReduce(TempStorage& storage) : storage_(storage) {}

    template <class Op>
    Value Reduce(Value value, Op op) {
        static_assert(kThreads % emulation::kWarp == 0);
        if (blockDim.x != kThreads) emulation::fail("BlockReduce for another block size");
        storage_.values[threadIdx.x] = value;
        __syncthreads();
        if (threadIdx.x != 0) return value;
        for (Value* warp = storage_.values; warp < storage_.values + kThreads; warp += emulation::kWarp) {
            for (unsigned distance = 1; distance < emulation::kWarp; distance *= 2)
                for (unsigned lane = 0; lane + distance < emulation::kWarp; ++lane)
                    warp[lane] = op(warp[lane], warp[lane + distance]);
            value = warp == storage_.values ? *warp : op(value, *warp);
        }
        return value;
    }

 private:
    TempStorage& storage_;
};

}  // namespace cub
