// The memory of a model's KV cache, in blocks that sequences' tables name.
//
// Layout:  [n_blocks, n_layers, 2, kKvBlockTokens, kv_width] floats, keys before values: a layer's
//          rows of a block lie together for the attention that reads them, and so does all of a
//          block, whose pages go back to the system at once. Pages that are never written cost
//          nothing.
// Errors:  RESOURCE_EXHAUSTED when the memory is not there
// Threads: distinct blocks from distinct threads
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "worker/engine/block_manager.h"
#include "worker/tensor/mapped_memory.h"

namespace walsh::engine {

class KvPool {
 public:
  struct Shape {
    int64_t n_layers = 0;
    int64_t kv_width = 0;
    int64_t n_blocks = 0;
  };
  static absl::StatusOr<KvPool> Create(const Shape& shape);
  static int64_t BytesPerToken(int64_t n_layers, int64_t kv_width) {
    return 2 * n_layers * kv_width * static_cast<int64_t>(sizeof(float));
  }

  // A layer's keys and values in block 0; those in block b are b · block_stride() floats further.
  float* keys(int64_t layer) const {
    return reinterpret_cast<float*>(memory_.data()) + 2 * layer * kKvBlockTokens * shape_.kv_width;
  }
  float* values(int64_t layer) const { return keys(layer) + kKvBlockTokens * shape_.kv_width; }
  int64_t block_stride() const { return 2 * shape_.n_layers * kKvBlockTokens * shape_.kv_width; }
  int64_t n_blocks() const { return shape_.n_blocks; }

  // Gives a block's whole pages back to the system. What the block holds is lost.
  void Discard(BlockId block);

 private:
  MappedMemory memory_;
  Shape shape_;
};

}  // namespace walsh::engine
