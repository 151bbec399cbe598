// Tensors as they stand in an artifact's shards, in the order in which they were written: what an
// ArtifactWriter has recorded, and what another writer of the same model can write again.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace walsh {

struct RecordedTensors {
  struct Entry {
    std::string name;
    std::string dtype;  // as in a safetensors header
    std::vector<int64_t> shape;
  };
  std::vector<Entry> entries;
  std::string bytes;  // of all of them, without gaps
};

}  // namespace walsh
