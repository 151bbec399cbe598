// The GGUF container, versions 2 and 3: typed metadata, tensor infos, aligned tensor data.
//
// Only the layout: what the keys mean for a model is gguf_model.h's. As strict as ggml's own reader
// about offsets: each tensor begins where the one before it ends, rounded up to the alignment.
//
// Source:  https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
// Errors:  INVALID_ARGUMENT  malformed: file, key or tensor, limit and value named
//          DATA_LOSS         ends inside its metadata or before its last tensor does
//          UNIMPLEMENTED     version 1, big-endian files, nested arrays, tensor types not read
// Threads: safe.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/io/random_access_file.h"
#include "worker/io/storage_type.h"

namespace walsh {

// Integers of every width come as int64_t (larger ones are refused), floats as double, arrays of
// booleans as integers.
using GgufValue = std::variant<int64_t, double, bool, std::string, std::vector<int64_t>,
                               std::vector<double>, std::vector<std::string>>;

struct GgufTensor {
  std::string name;
  StorageType type = StorageType::kF32;
  std::vector<int64_t> dims;  // fastest first: dims[0] is a row's length
  int64_t offset = 0;         // from the start of the file
  int64_t size_bytes = 0;
};

struct GgufContents {
  std::map<std::string, GgufValue, std::less<>> metadata;
  std::vector<GgufTensor> tensors;  // in the order of their bytes
};

absl::StatusOr<GgufContents> ParseGguf(const RandomAccessFile& file);

}  // namespace walsh
