// Stand-in for CUB's header of the same name; see block_reduce.cuh.
#pragma once

#include "cuda.h"

namespace cub {

template <class Value, int kThreads>
class BlockScan {
 public:
    struct TempStorage {
        Value values[kThreads];
    };

    explicit BlockScan(TempStorage& storage) : storage_(storage) {}

    void InclusiveSum(Value value, Value& sum, Value& total) {
        if (blockDim.x != kThreads) emulation::fail("BlockScan for another block size");
        storage_.values[threadIdx.x] = value;
        __syncthreads();
        Value running{};
        sum = Value{};
        for (int i = 0; i < kThreads; ++i) {
            running += storage_.values[i];
            if (i == static_cast<int>(threadIdx.x)) sum = running;
        }
        total = running;
    }

 private:
    TempStorage& storage_;
};

}  // namespace cub
