// Registers the operators with torch and opens the Python module daemon_fast._C, which holds the build facts.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "ops.h"

#ifndef DAEMON_FAST_VERSION
#define DAEMON_FAST_VERSION ""
#endif

STABLE_TORCH_LIBRARY(daemon_fast, m) {
    m.def("repetition(Tensor tokens, Tensor lengths, int[] ngrams, int[] windows) -> Tensor");
    m.def("token_logprobs(Tensor logits, Tensor ids, float temperature) -> (Tensor, Tensor)");
    m.def("sample_tokens(Tensor logits, Tensor uniforms, float temperature) -> (Tensor, Tensor, Tensor)");
    m.def("importance_weights(Tensor log_w) -> (Tensor, Tensor, Tensor)");
    m.def(
        "sir_select(Tensor features, Tensor mu, Tensor? base_log_w, Tensor uniforms) -> "
        "(Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "tilted_moments(Tensor features, Tensor mu, Tensor? base_log_w, bool per_prefix) -> "
        "(Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(daemon_fast, CPU, m) {
    m.impl("repetition", TORCH_BOX(&daemon_fast::cpu::repetition));
    m.impl("token_logprobs", TORCH_BOX(&daemon_fast::cpu::token_logprobs));
    m.impl("sample_tokens", TORCH_BOX(&daemon_fast::cpu::sample_tokens));
    m.impl("importance_weights", TORCH_BOX(&daemon_fast::cpu::importance_weights));
    m.impl("sir_select", TORCH_BOX(&daemon_fast::cpu::sir_select));
    m.impl("tilted_moments", TORCH_BOX(&daemon_fast::cpu::tilted_moments));
}

#ifdef DAEMON_FAST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(daemon_fast, CUDA, m) {
    m.impl("repetition", TORCH_BOX(&daemon_fast::cuda::repetition));
    m.impl("token_logprobs", TORCH_BOX(&daemon_fast::cuda::token_logprobs));
    m.impl("sample_tokens", TORCH_BOX(&daemon_fast::cuda::sample_tokens));
    m.impl("importance_weights", TORCH_BOX(&daemon_fast::cuda::importance_weights));
    m.impl("sir_select", TORCH_BOX(&daemon_fast::cuda::sir_select));
    m.impl("tilted_moments", TORCH_BOX(&daemon_fast::cuda::tilted_moments));
}
#endif

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled operators of daemon_fast; importing it registers torch.ops.daemon_fast.";
    m.def(
        "build_info",
        [] {
            pybind11::dict info;
            info["version"] = DAEMON_FAST_VERSION;
            info["torch"] = DAEMON_FAST_TORCH;
            info["compiler"] =
#if defined(__clang__)
                "clang " __clang_version__;
#else
                "g++ " __VERSION__;
#endif
#ifdef DAEMON_FAST_WITH_CUDA
            info["cuda"] = DAEMON_FAST_CUDA_VERSION;
            info["cuda_architectures"] = DAEMON_FAST_ARCHITECTURES;
#else
            info["cuda"] = pybind11::none();
            info["cuda_architectures"] = "";
#endif
            return info;
        },
        "Facts about this build: version, torch (whose headers were used; any torch >= 2.10 can load it), compiler, "
        "cuda (version of nvcc, or None) and cuda_architectures.");
}
