// race_select on CUDA.
#include "cuda/select.h"

namespace daemon_fast::cuda {

STABLE_TORCH_LIBRARY_IMPL(daemon_fast, CUDA, m) {
    m.impl("race_select", TORCH_BOX(&select<Race>));
}

}  // namespace daemon_fast::cuda
