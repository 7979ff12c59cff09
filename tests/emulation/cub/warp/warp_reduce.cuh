// Stand-in for CUB's header of the same name; see block_reduce.cuh. Only lane 0 gets the result.
#pragma once

#include "cuda.h"

namespace cub {

template <class Value>
class WarpReduce {
 public:
    struct TempStorage {};
    explicit WarpReduce(TempStorage&) {}

    template <class Op>
    Value Reduce(Value value, Op op) {
        for (int distance = 1; distance < 32; distance *= 2) {
            const Value other = __shfl_down_sync(~0u, value, distance);
            if (threadIdx.x % emulation::kWarp + distance < emulation::kWarp) value = op(value, other);
        }
        return value;
    }
};

}  // namespace cub
