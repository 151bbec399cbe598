// How the byte-level vocabularies that we know cut text into words before merging, and what the
// name in a GGUF file's tokenizer.ggml.pre means.
//
// Source:  the patterns of the models' own tokenizer.json; for the names, the convention of
//          llama.cpp's converter.
#pragma once

#include <algorithm>
#include <array>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

namespace walsh {

// As they are spelt in tokenizer.json.
inline constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
inline constexpr std::string_view kLlama3Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
inline constexpr std::string_view kQwen2Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

struct PreTokenizerConvention {
  std::string_view name;
  std::string_view pattern;
  bool splits_digits = false;  // each digit on its own, before the pattern
  bool ignores_merges = false;
  bool adds_bos = false;  // where the file has no tokenizer.ggml.add_bos_token
};

inline constexpr std::array kPreTokenizerConventions = {
    PreTokenizerConvention{.name = "gpt-2", .pattern = kGpt2Pattern},
    PreTokenizerConvention{.name = "smollm", .pattern = kGpt2Pattern, .splits_digits = true},
    PreTokenizerConvention{.name = "qwen2", .pattern = kQwen2Pattern},
    PreTokenizerConvention{
        .name = "llama-bpe", .pattern = kLlama3Pattern, .ignores_merges = true, .adds_bos = true},
    PreTokenizerConvention{
        .name = "llama3", .pattern = kLlama3Pattern, .ignores_merges = true, .adds_bos = true},
};

// By the value of tokenizer.ggml.pre. UNIMPLEMENTED for a missing or unknown one.
inline absl::StatusOr<PreTokenizerConvention> FindPreTokenizerConvention(const std::string& pre) {
  const auto found = std::find_if(kPreTokenizerConventions.begin(), kPreTokenizerConventions.end(),
                                  [&](const auto& convention) { return convention.name == pre; });
  if (found != kPreTokenizerConventions.end()) return *found;
  return absl::UnimplementedError(
      pre.empty() ? std::string("tokenizer.ggml.pre is missing: there is no telling how this "
                                "vocabulary cuts text")
                  : absl::StrCat("tokenizer.ggml.pre '", pre.substr(0, 64),
                                 "' is not supported; supported: gpt-2, llama-bpe, llama3, qwen2, "
                                 "smollm"));
}

}  // namespace walsh
