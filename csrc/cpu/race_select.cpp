// race_select on the CPU.
#include "cpu/select.h"

namespace daemon_fast::cpu {

STABLE_TORCH_LIBRARY_FRAGMENT(daemon_fast, m) {
    m.def(
        "race_select(Tensor features, Tensor mu, Tensor uniforms, Tensor? base_log_w=None) -> "
        "(Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(daemon_fast, CPU, m) {
    m.impl("race_select", TORCH_BOX(&select<Race>));
}

}  // namespace daemon_fast::cpu
