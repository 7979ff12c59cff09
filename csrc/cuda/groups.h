// Host side of the kernels that give each group of candidates a block: block size, scratch, grid.
#pragma once

#include "cuda/launch.h"

namespace daemon_fast::cuda {

// How groups of M candidates are spread over blocks, and where a block keeps `doubles` values: in shared memory, or in
// global memory where they don't fit.
struct GroupLaunch {
    int64_t M, blocks, shared_bytes;
    std::optional<Tensor> global;

    GroupLaunch(const Tensor& input, int64_t groups, int64_t M, int64_t doubles)
        : M(M), blocks(groups), shared_bytes(8 * doubles) {
        const int device = input.get_device_index();
        if (shared_bytes <= max_shared_bytes(device) - kMaxStaticSharedBytes) return;
        blocks = blocks_with_scratch(groups, shared_bytes, device);
        shared_bytes = 0;
        global = empty_like_with(input, {blocks * doubles}, ScalarType::Double);
    }

    double* scratch() { return global ? global->mutable_data_ptr<double>() : nullptr; }

    // Calls `run` with the number of threads, and whether the scratch is shared, as compile-time constants. Only many
    // candidates don't fit.
    template <class Run>
    void dispatch(const Run& run) const {
        if (global)
            run(std::integral_constant<int, 512>(), std::false_type());
        else if (M <= 64)
            run(std::integral_constant<int, 32>(), std::true_type());
        else if (M <= 1024)
            run(std::integral_constant<int, 128>(), std::true_type());
        else
            run(std::integral_constant<int, 512>(), std::true_type());
    }
};

}  // namespace daemon_fast::cuda
