// The model architectures that this version takes, by the names that files have for them.
//
// Workers read them; the coordinator lists them, also when no worker is there.
#pragma once

#include <array>
#include <string_view>

namespace walsh {

// config.json's "architectures".
inline constexpr std::array<std::string_view, 6> kHfArchitectures = {
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM",
    "Qwen3ForCausalLM", "Phi3ForCausalLM",    "Gemma3ForCausalLM"};
// GGUF's "general.architecture".
inline constexpr std::array<std::string_view, 5> kGgufArchitectures = {"llama", "qwen2", "qwen3",
                                                                       "phi3", "gemma3"};

}  // namespace walsh
