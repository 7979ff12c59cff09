// Stand-in for CUB's header of the same name; see block_reduce.cuh. Each lane of one warp adds up a segment of the
// block's values, the warp scans the segments, and each lane goes over its own once more.
#pragma once

#include "cuda.h"

namespace cub {

template <class Value, int kThreads>
class BlockScan {
 public:
    struct TempStorage {
        Value values[kThreads], sums[kThreads];
    };

    explicit BlockScan(TempStorage& storage) : storage_(storage) {}

    void InclusiveSum(Value value, Value& sum, Value& total) {
        static_assert(kThreads % emulation::kWarp == 0);
        if (blockDim.x != kThreads) emulation::fail("BlockScan for another block size");
        storage_.values[threadIdx.x] = value;
        __syncthreads();
        if (threadIdx.x == 0) scan(storage_.values, storage_.sums);
        __syncthreads();
        sum = storage_.sums[threadIdx.x];
        total = storage_.sums[kThreads - 1];
    }

 private:
    static void scan(const Value* values, Value* sums) {
        constexpr int kLanes = emulation::kWarp, kSegment = kThreads / kLanes;
        Value segments[kLanes] = {};
        for (int i = 0; i < kThreads; ++i) segments[i / kSegment] += values[i];
        for (int distance = 1; distance < kLanes; distance *= 2)
            for (int lane = kLanes - 1; lane >= distance; --lane) segments[lane] += segments[lane - distance];
        for (int i = 0; i < kThreads; ++i) {
            const int lane = i / kSegment;
            if (kSegment == 1)
                sums[i] = segments[i];
            else if (i % kSegment == 0)
                sums[i] = (lane ? segments[lane - 1] : Value{}) + values[i];
            else
                sums[i] = sums[i - 1] + values[i];
        }
    }

    TempStorage& storage_;
};

}  // namespace cub
