// What a GGUF file says about its model: shape, vocabulary, tensor names.
//
// llama.cpp writes Mistral checkpoints under architecture "llama"; without a sliding window the
// two are one model, so both come as LlamaForCausalLM. What it knows of Gemma 3 beside the file
// (which layers slide, their RoPE base) is known here, too. Norms hold what HF's files leave out
// (ModelConfig::norm_offset).
//
// Errors:  INVALID_ARGUMENT  a key is missing, of the wrong type or out of range (named)
//          UNIMPLEMENTED     another architecture, vocabulary model or RoPE scaling; experts
// Threads: safe.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/io/gguf.h"
#include "worker/io/gguf_vocabulary.h"
#include "worker/io/model_config.h"

namespace walsh {

// Tied embeddings and biases follow from the tensors that are there. Reads rope_freqs.weight.
absl::StatusOr<ModelConfig> GgufModelConfig(const RandomAccessFile& file,
                                            const GgufContents& contents);

absl::StatusOr<GgufVocabulary> GgufVocabularyOf(const RandomAccessFile& file,
                                                const GgufContents& contents);

// A string's contents, or empty where the key is absent or no string.
std::string GgufStringOrEmpty(const GgufContents& contents, std::string_view key);

// The divisors of the rotary frequencies, [head_dim / 2], that the llama3 parameters give.
std::vector<float> Llama3FrequencyDivisors(const RopeScaling& scaling, int64_t head_dim,
                                           double rope_theta);

// The inverse of HfTensorName. UNIMPLEMENTED for a tensor that Llama does not have.
absl::StatusOr<std::string> GgufTensorName(std::string_view hf_name);

// "blk.3.attn_q.weight" gives "model.layers.3.self_attn.q_proj.weight"; some names mean something
// else by `architecture` (HF's name). A layer's tensor that no family has keeps its suffix
// ("model.layers.3.attn_sinks.weight"), so that the check against the configuration refuses it;
// other unknown names come back as they are.
std::string HfTensorName(std::string_view gguf_name, std::string_view architecture);

// The llama3 parameters whose formula gives these divisors, by the sets that Meta published;
// nullopt when none does. `head_dim` and `rope_theta` are the model's.
std::optional<RopeScaling> Llama3ScalingFromDivisors(const std::vector<float>& divisors,
                                                     int64_t head_dim, double rope_theta);

}  // namespace walsh
