// A model in one GGUF file.

#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/io/file_checkpoint.h"
#include "worker/io/gguf.h"
#include "worker/io/gguf_model.h"

namespace walsh {
namespace {

bool Contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

// llama.cpp's converter permutes the rows of Q and K (and their biases) for interleaved RoPE; those
// of other architectures it leaves as they are.
int64_t InterleavedHeads(const std::string& hf_name, const ModelConfig& config) {
  if (config.architecture != "LlamaForCausalLM") return 0;
  if (Contains(hf_name, "self_attn.q_proj.")) return config.n_heads;
  if (Contains(hf_name, "self_attn.k_proj.")) return config.n_kv_heads;
  return 0;
}

absl::Status AddTensor(const std::string& file, const GgufTensor& tensor,
                       CheckpointContents& contents) {
  if (tensor.dims.size() > 2) {
    return absl::InvalidArgumentError(absl::StrCat(file, ": tensor '", tensor.name, "' has ",
                                                   tensor.dims.size(),
                                                   " dimensions, must have 1 or 2"));
  }
  const bool is_one_dimensional = tensor.dims.size() == 1;
  const std::string hf_name = HfTensorName(tensor.name, contents.config.architecture);
  StoredTensor stored{.name = tensor.name,
                      .type = tensor.type,
                      .offset = tensor.offset,
                      .rows = is_one_dimensional ? 1 : tensor.dims[1],
                      .cols = tensor.dims[0],
                      .is_one_dimensional = is_one_dimensional,
                      .n_interleaved_heads = InterleavedHeads(hf_name, contents.config)};
  const auto [entry, is_new] =
      contents.tensors.try_emplace(hf_name, CheckpointContents::Located{0, std::move(stored)});
  if (is_new) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(file, ": tensors '", entry->second.tensor.name,
                                                 "' and '", tensor.name, "' are both ", hf_name));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Checkpoint>> OpenGgufCheckpoint(const std::string& path) {
  WALSH_ASSIGN_OR_RETURN(std::unique_ptr<RandomAccessFile> file, OpenRandomAccessFile(path));
  return MakeGgufCheckpoint(std::move(file), path);
}

absl::StatusOr<std::unique_ptr<Checkpoint>> MakeGgufCheckpoint(
    std::unique_ptr<RandomAccessFile> file, const std::string& path) {
  WALSH_ASSIGN_OR_RETURN(const GgufContents gguf, ParseGguf(*file));
  CheckpointContents contents;
  contents.format_family = "GGUF";
  WALSH_ASSIGN_OR_RETURN(contents.config, GgufModelConfig(*file, gguf));
  WALSH_ASSIGN_OR_RETURN(contents.tokenizer.gguf, GgufVocabularyOf(*file, gguf));
  if (static_cast<int64_t>(contents.tokenizer.gguf->tokens.size()) > contents.config.vocab) {
    return absl::InvalidArgumentError(
        absl::StrCat(file->name(), ": ", contents.tokenizer.gguf->tokens.size(),
                     " tokens, the embedding has only ", contents.config.vocab, " rows"));
  }
  contents.tokenizer.chat_template = GgufStringOrEmpty(gguf, "tokenizer.chat_template");
  contents.license = GgufStringOrEmpty(gguf, "general.license");
  for (const GgufTensor& tensor : gguf.tensors) {
    WALSH_RETURN_IF_ERROR(AddTensor(file->name(), tensor, contents));
  }
  contents.fingerprint_paths.push_back(path);
  contents.files.push_back(std::move(file));
  return MakeFileCheckpoint(std::move(contents));
}

}  // namespace walsh
