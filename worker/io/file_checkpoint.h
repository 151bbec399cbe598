// What both checkpoint formats come to: a configuration, a tokenizer, and tensors at offsets.
#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/io/checkpoint.h"
#include "worker/io/random_access_file.h"
#include "worker/io/stored_tensor.h"

namespace walsh {

struct CheckpointContents {
  struct Located {
    size_t file_index = 0;  // into `files`
    StoredTensor tensor;
  };

  ModelConfig config;
  TokenizerSource tokenizer;
  std::string format_family;  // "safetensors", "GGUF"
  std::string license;
  std::map<std::string, std::string> side_files;
  std::vector<std::unique_ptr<RandomAccessFile>> files;
  std::map<std::string, Located, std::less<>> tensors;  // by HF name
  // What the fingerprint covers: paths, weights and small files alike.
  std::vector<std::string> fingerprint_paths;
};

// Checks the tensors against the configuration. Fused linears appear as their parts. A tied head
// that is stored only under the head's name (or only under the embedding's) answers to both.
absl::StatusOr<std::unique_ptr<Checkpoint>> MakeFileCheckpoint(CheckpointContents contents);

absl::StatusOr<std::unique_ptr<Checkpoint>> OpenHfCheckpoint(const std::string& directory);
absl::StatusOr<std::unique_ptr<Checkpoint>> OpenGgufCheckpoint(const std::string& path);
// Of a file that is open, or in memory; `path` is what the fingerprint reads.
absl::StatusOr<std::unique_ptr<Checkpoint>> MakeGgufCheckpoint(
    std::unique_ptr<RandomAccessFile> file, const std::string& path);

}  // namespace walsh
