// Stand-in for CUB's header of the same name; see block_reduce.cuh.
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
        for (int distance = 16; distance > 0; distance /= 2) value = op(value, __shfl_xor_sync(~0u, value, distance));
        return value;
    }
};

}  // namespace cub
