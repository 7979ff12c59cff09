// Host side of the kernels that give each group of candidates a block: block size, scratch, grid.
#pragma once

#include "cuda/launch.h"

namespace daemon_fast::cuda {

constexpr int64_t kBlocksWithGlobalScratch = 1024;  // enough to fill any GPU; each has scratch of its own

// Where a block keeps `doubles` values a group: shared memory, or global memory where they don't fit.
struct GroupScratch {
    int64_t blocks, shared_bytes;
    std::optional<Tensor> global;

    GroupScratch(const Tensor& input, int64_t groups, int64_t doubles) : blocks(groups), shared_bytes(8 * doubles) {
        // The kernels' static shared memory needs a little of it too.
        if (shared_bytes <= max_shared_bytes(input.get_device_index()) - 8 * 1024) return;
        blocks = std::min(groups, kBlocksWithGlobalScratch);
        shared_bytes = 0;
        global = empty_like_with(input, {blocks * doubles}, ScalarType::Double);
    }

    double* data() { return global ? global->mutable_data_ptr<double>() : nullptr; }
};

// Calls `run` with the number of threads for M candidates, as a compile-time constant.
template <class Run>
void with_threads(int64_t M, const Run& run) {
    if (M <= 64)
        run(std::integral_constant<int, 32>());
    else if (M <= 1024)
        run(std::integral_constant<int, 128>());
    else
        run(std::integral_constant<int, 512>());
}

}  // namespace daemon_fast::cuda
