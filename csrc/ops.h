// The operators (schemas in module.cpp), one implementation per device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace daemon_fast {

using torch::stable::Tensor;

namespace cpu {
Tensor repetition(Tensor tokens, Tensor lengths, std::vector<int64_t> ngrams, std::vector<int64_t> windows);
std::tuple<Tensor, Tensor> token_logprobs(Tensor logits, Tensor ids, double temperature);
std::tuple<Tensor, Tensor, Tensor> sample_tokens(Tensor logits, Tensor uniforms, double temperature);
std::tuple<Tensor, Tensor, Tensor> importance_weights(Tensor log_w);
std::tuple<Tensor, Tensor, Tensor, Tensor> sir_select(
    Tensor features, Tensor mu, std::optional<Tensor> base_log_w, Tensor uniforms);
std::tuple<Tensor, Tensor, Tensor> tilted_moments(
    Tensor features, Tensor mu, std::optional<Tensor> base_log_w, bool per_prefix);
}  // namespace cpu

namespace cuda {
Tensor repetition(Tensor tokens, Tensor lengths, std::vector<int64_t> ngrams, std::vector<int64_t> windows);
std::tuple<Tensor, Tensor> token_logprobs(Tensor logits, Tensor ids, double temperature);
std::tuple<Tensor, Tensor, Tensor> sample_tokens(Tensor logits, Tensor uniforms, double temperature);
std::tuple<Tensor, Tensor, Tensor> importance_weights(Tensor log_w);
std::tuple<Tensor, Tensor, Tensor, Tensor> sir_select(
    Tensor features, Tensor mu, std::optional<Tensor> base_log_w, Tensor uniforms);
std::tuple<Tensor, Tensor, Tensor> tilted_moments(
    Tensor features, Tensor mu, std::optional<Tensor> base_log_w, bool per_prefix);
}  // namespace cuda

}  // namespace daemon_fast
