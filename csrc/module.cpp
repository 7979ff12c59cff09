// The Python module daemon_fast._C: the build facts. Each operator registers itself with torch, at the end of its file
// in cpu/ (with its schema) and in cuda/.
#include <pybind11/pybind11.h>

#ifndef DAEMON_FAST_VERSION
#define DAEMON_FAST_VERSION ""
#endif

PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
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
