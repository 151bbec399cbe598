// The safetensors format: an eight-byte header length, a JSON header, the tensors' bytes.
//
// Stricter than the format's own reader where that costs no honest file anything: the header has at
// most 32 MiB, names are printable, unknown members are refused. The header is read by events, so
// nothing in it can make the reader allocate more than the tensors that it names.
//
// Source:  https://github.com/huggingface/safetensors (format); docs/artifact-format.md
// Errors:  INVALID_ARGUMENT  malformed: file, tensor, limit and value named
//          DATA_LOSS         shorter than its header says
//          UNIMPLEMENTED     a dtype that the format's reader does not know
// Threads: safe.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/io/random_access_file.h"

namespace walsh {

struct SafetensorsEntry {
  std::string name;
  std::string dtype;  // "F32", "BF16", "I32", …
  std::vector<int64_t> shape;
  int64_t offset = 0;      // from the start of the file
  int64_t size_bytes = 0;  // product of the shape times the dtype's size
};

// All tensors of the file, in the order of their bytes, which they cover without gap or overlap.
absl::StatusOr<std::vector<SafetensorsEntry>> ParseSafetensors(const RandomAccessFile& file);

// Bytes of one element; 0 for a dtype that is not known.
int64_t SafetensorsDtypeBytes(std::string_view dtype);

}  // namespace walsh
