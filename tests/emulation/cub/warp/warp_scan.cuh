// Stand-in for CUB's header of the same name; see block_reduce.cuh.
#pragma once

#include "cuda.h"

namespace cub {

template <class Value>
class WarpScan {
 public:
    struct TempStorage {};
    explicit WarpScan(TempStorage&) {}

    void InclusiveSum(Value value, Value& sum) {
        const int lane = static_cast<int>(threadIdx.x % emulation::kWarp);
        sum = value;
        for (int distance = 1; distance < 32; distance *= 2) {
            const Value before = __shfl_sync(~0u, sum, std::max(lane - distance, 0));
            if (lane >= distance) sum += before;
        }
    }
};

}  // namespace cub
