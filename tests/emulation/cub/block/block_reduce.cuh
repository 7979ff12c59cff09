// Stand-in for CUB's header of the same name: same interface and same duties of the caller (only thread 0 gets the
// result; the storage is used again only behind a barrier), none of the code.
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
        if (blockDim.x != kThreads) emulation::fail("BlockReduce for another block size");
        storage_.values[threadIdx.x] = value;
        __syncthreads();
        if (threadIdx.x == 0)
            for (int i = 1; i < kThreads; ++i) value = op(value, storage_.values[i]);
        return value;
    }

 private:
    TempStorage& storage_;
};

}  // namespace cub
