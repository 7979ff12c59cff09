// What the CPU and the CUDA side of every operator share: argument checks, and what of torch they need. Kernels behind
// the checks trust their input. Every message names the argument, what came and what was expected.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace daemon_fast {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
}

inline std::string shape(const Tensor& tensor) {
    std::ostringstream out;
    out << '[';
    for (int64_t d = 0; d < tensor.dim(); ++d) out << (d ? ", " : "") << tensor.size(d);
    out << ']';
    return out.str();
}

inline const char* dtype_name(ScalarType type) {
    switch (type) {
        case ScalarType::Int: return "int32";
        case ScalarType::Long: return "int64";
        case ScalarType::Half: return "float16";
        case ScalarType::BFloat16: return "bfloat16";
        case ScalarType::Float: return "float32";
        case ScalarType::Double: return "float64";
        case ScalarType::Bool: return "bool";
        default: return "another dtype";
    }
}

// `what` is written as op.argument, for example "repetition: tokens".
inline void check_dim(const Tensor& tensor, int64_t dim, const char* what, const char* layout) {
    if (tensor.dim() != dim) fail(what, " must have shape ", layout, ", got ", shape(tensor));
}

inline void check_size(const Tensor& tensor, int64_t dim, int64_t size, const char* what, const char* expected) {
    if (tensor.size(dim) != size)
        fail(what, " must have ", expected, " = ", size, " at dimension ", dim, ", got shape ", shape(tensor));
}

template <class... Allowed>
void check_dtype(const Tensor& tensor, const char* what, Allowed... allowed) {
    const ScalarType type = tensor.scalar_type();
    if (((type == allowed) || ...)) return;
    std::ostringstream names;
    bool first = true;
    ((names << (first ? "" : " or ") << dtype_name(allowed), first = false), ...);
    fail(what, " must be ", names.str(), ", got ", dtype_name(type));
}

inline void check_same_device(const Tensor& tensor, const Tensor& reference, const char* what) {
    if (tensor.is_cuda() != reference.is_cuda() || tensor.get_device_index() != reference.get_device_index())
        fail(what, " must be on the same device as the first argument");
}

inline Tensor empty_like_with(const Tensor& like, std::vector<int64_t> size, ScalarType type) {
    return torch::stable::new_empty(like, IntHeaderOnlyArrayRef(size.data(), size.size()), type);
}

// run(feature, base) with values of their types; without base weights, any type will do.
template <class Run>
void with_base(const Tensor& features, const std::optional<Tensor>& base_log_w, const Run& run) {
    const bool wide = base_log_w && base_log_w->scalar_type() == ScalarType::Double;
    const auto with_feature = [&](auto feature) { wide ? run(feature, double{}) : run(feature, float{}); };
    features.scalar_type() == ScalarType::Double ? with_feature(double{}) : with_feature(float{});
}

// ---- one check per operator ------------------------------------------------------------------------------

inline void check_repetition(
    const Tensor& tokens, const Tensor& lengths, const std::vector<int64_t>& ngrams,
    const std::vector<int64_t>& windows) {
    check_dim(tokens, 2, "repetition: tokens", "[R, T]");
    check_dtype(tokens, "repetition: tokens", ScalarType::Int, ScalarType::Long);
    check_dim(lengths, 1, "repetition: lengths", "[R]");
    check_dtype(lengths, "repetition: lengths", ScalarType::Int, ScalarType::Long);
    check_size(lengths, 0, tokens.size(0), "repetition: lengths", "tokens.shape[0]");
    check_same_device(lengths, tokens, "repetition: lengths");
    for (size_t i = 0; i < ngrams.size(); ++i)
        if (ngrams[i] < 1) fail("repetition: ngrams[", i, "] = ", ngrams[i], " is below the minimum 1");
    for (size_t i = 0; i < windows.size(); ++i)
        if (windows[i] < 1) fail("repetition: windows[", i, "] = ", windows[i], " is below the minimum 1");
}

inline void check_gopher_repetition(
    const Tensor& characters, const Tensor& text_ends, const std::vector<int64_t>& top,
    const std::vector<int64_t>& duplicated) {
    check_dim(characters, 1, "gopher_repetition: characters", "[C]");
    check_dtype(characters, "gopher_repetition: characters", ScalarType::Int);
    check_dim(text_ends, 1, "gopher_repetition: text_ends", "[N]");
    check_dtype(text_ends, "gopher_repetition: text_ends", ScalarType::Long);
    for (size_t i = 0; i < top.size(); ++i)
        if (top[i] < 1) fail("gopher_repetition: top[", i, "] = ", top[i], " is below the minimum 1");
    for (size_t i = 0; i < duplicated.size(); ++i)
        if (duplicated[i] < 1)
            fail("gopher_repetition: duplicated[", i, "] = ", duplicated[i], " is below the minimum 1");
}

// logits [R, V] and a temperature: the arguments that token_logprobs and sample_tokens share.
inline void check_logits(const std::string& op, const Tensor& logits, double temperature) {
    const std::string name = op + ": logits";
    check_dim(logits, 2, name.c_str(), "[R, V]");
    check_dtype(logits, name.c_str(), ScalarType::Half, ScalarType::BFloat16, ScalarType::Float);
    if (!(temperature > 0) || !std::isfinite(temperature))
        fail(op, ": temperature = ", temperature, " must be positive and finite");
    if (logits.size(1) == 0 && logits.size(0) > 0) fail(name, " has an empty vocabulary: shape ", shape(logits));
}

inline void check_sample_tokens(const Tensor& logits, const Tensor& uniforms, double temperature) {
    check_logits("sample_tokens", logits, temperature);
    check_dim(uniforms, 1, "sample_tokens: uniforms", "[R]");
    check_dtype(uniforms, "sample_tokens: uniforms", ScalarType::Double);
    check_size(uniforms, 0, logits.size(0), "sample_tokens: uniforms", "logits.shape[0]");
    check_same_device(uniforms, logits, "sample_tokens: uniforms");
}

inline void check_token_logprobs(const std::string& op, const Tensor& logits, const Tensor& ids, double temperature) {
    const std::string name = op + ": ids";
    check_logits(op, logits, temperature);
    check_dim(ids, 1, name.c_str(), "[R]");
    check_dtype(ids, name.c_str(), ScalarType::Int, ScalarType::Long);
    check_size(ids, 0, logits.size(0), name.c_str(), "logits.shape[0]");
    check_same_device(ids, logits, name.c_str());
}

inline void check_token_logprobs_backward(
    const Tensor& grad_log_p, const Tensor& grad_log_q, const Tensor& logits, const Tensor& ids, double temperature) {
    const std::string op = "token_logprobs_backward";
    check_token_logprobs(op, logits, ids, temperature);
    for (const auto& [name, grad] : {std::pair(": grad_log_p", &grad_log_p), std::pair(": grad_log_q", &grad_log_q)}) {
        check_dim(*grad, 1, (op + name).c_str(), "[R]");
        check_dtype(*grad, (op + name).c_str(), ScalarType::Float);
        check_size(*grad, 0, logits.size(0), (op + name).c_str(), "logits.shape[0]");
        check_same_device(*grad, logits, (op + name).c_str());
    }
}

inline void check_append_tokens(
    const Tensor& tokens, const Tensor& log_p, const Tensor& log_q, const Tensor& lengths, const Tensor& running,
    const Tensor& ids, const Tensor& ids_log_p, const Tensor& ids_log_q, const Tensor& slot, const Tensor& rows,
    const Tensor& eos) {
    const auto check = [&](const Tensor& x, const std::string& name, ScalarType type, const char* layout) {
        const std::string what = "append_tokens: " + name;
        check_dim(x, layout == std::string("[T, R]") ? 2 : 1, what.c_str(), layout);
        check_dtype(x, what.c_str(), type);
        check_same_device(x, tokens, what.c_str());
        if (!x.is_contiguous()) fail(what, " must be contiguous");
    };
    check(tokens, "tokens", ScalarType::Long, "[T, R]");
    check(log_p, "log_p", ScalarType::Float, "[T, R]");
    check(log_q, "log_q", ScalarType::Float, "[T, R]");
    check(lengths, "lengths", ScalarType::Long, "[R]");
    check(running, "running", ScalarType::Bool, "[R]");
    check(ids, "ids", ScalarType::Long, "[D]");
    check(ids_log_p, "ids_log_p", ScalarType::Float, "[D]");
    check(ids_log_q, "ids_log_q", ScalarType::Float, "[D]");
    check(slot, "slot", ScalarType::Long, "[1]");
    check(rows, "rows", ScalarType::Long, "[D]");
    check(eos, "eos", ScalarType::Long, "[E]");
    for (int64_t d = 0; d < 2; ++d) {
        const std::string expected = "tokens.shape[" + std::to_string(d) + "]";
        check_size(log_p, d, tokens.size(d), "append_tokens: log_p", expected.c_str());
        check_size(log_q, d, tokens.size(d), "append_tokens: log_q", expected.c_str());
    }
    check_size(lengths, 0, tokens.size(1), "append_tokens: lengths", "tokens.shape[1]");
    check_size(running, 0, tokens.size(1), "append_tokens: running", "tokens.shape[1]");
    check_size(ids_log_p, 0, ids.size(0), "append_tokens: ids_log_p", "ids.shape[0]");
    check_size(ids_log_q, 0, ids.size(0), "append_tokens: ids_log_q", "ids.shape[0]");
    check_size(rows, 0, ids.size(0), "append_tokens: rows", "ids.shape[0]");
    check_size(slot, 0, 1, "append_tokens: slot", "size");
}

inline void check_importance_weights(const Tensor& log_w) {
    check_dim(log_w, 2, "importance_weights: log_w", "[G, M]");
    check_dtype(log_w, "importance_weights: log_w", ScalarType::Float, ScalarType::Double);
    if (log_w.size(1) == 0 && log_w.size(0) > 0)
        fail("importance_weights: log_w has no candidates (M = 0): shape ", shape(log_w));
}

// features [G, M, K], mu [K], base_log_w [G, M] or none: the arguments that sir_select and tilted_moments share.
inline void check_tilt(
    const std::string& op, const Tensor& features, const Tensor& mu, const std::optional<Tensor>& base_log_w) {
    const std::string f = op + ": features", m = op + ": mu", b = op + ": base_log_w";
    check_dim(features, 3, f.c_str(), "[G, M, K]");
    check_dtype(features, f.c_str(), ScalarType::Float, ScalarType::Double);
    check_dim(mu, 1, m.c_str(), "[K]");
    check_dtype(mu, m.c_str(), ScalarType::Double);
    check_size(mu, 0, features.size(2), m.c_str(), "features.shape[2]");
    check_same_device(mu, features, m.c_str());
    if (features.size(1) == 0 && features.size(0) > 0) fail(f, " has no candidates (M = 0): shape ", shape(features));
    if (!base_log_w) return;
    check_dim(*base_log_w, 2, b.c_str(), "[G, M]");
    check_dtype(*base_log_w, b.c_str(), ScalarType::Float, ScalarType::Double);
    check_size(*base_log_w, 0, features.size(0), b.c_str(), "features.shape[0]");
    check_size(*base_log_w, 1, features.size(1), b.c_str(), "features.shape[1]");
    check_same_device(*base_log_w, features, b.c_str());
}

// uniforms [G, *draw] or [G, S, *draw]: one a draw (draw_dims = 0), or one a draw and candidate (1).
inline void check_select(
    const std::string& op, int64_t draw_dims, const Tensor& features, const Tensor& mu, const Tensor& uniforms,
    const std::optional<Tensor>& base_log_w) {
    check_tilt(op, features, mu, base_log_w);
    const std::string u = op + ": uniforms";
    if (uniforms.dim() != 1 + draw_dims && uniforms.dim() != 2 + draw_dims)
        fail(u, " must have shape ", draw_dims ? "[G, M] or [G, S, M]" : "[G] or [G, S]", ", got ", shape(uniforms));
    check_dtype(uniforms, u.c_str(), ScalarType::Double);
    check_size(uniforms, 0, features.size(0), u.c_str(), "features.shape[0]");
    if (draw_dims) check_size(uniforms, uniforms.dim() - 1, features.size(1), u.c_str(), "features.shape[1]");
    check_same_device(uniforms, features, u.c_str());
}

inline void check_tilted_moments(
    const Tensor& features, const Tensor& mu, const std::optional<Tensor>& base_log_w,
    const std::string& normalization) {
    check_tilt("tilted_moments", features, mu, base_log_w);
    if (normalization != "per_prefix" && normalization != "global")
        fail("tilted_moments: normalization = '", normalization, "' must be 'per_prefix' or 'global'");
    if (features.size(0) == 0) fail("tilted_moments: features has no prefixes (N = 0): shape ", shape(features));
}

}  // namespace daemon_fast
