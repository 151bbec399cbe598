// A KV cache for sequences that a test runs by hand.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "worker/engine/kv_pool.h"
#include "worker/io/model_config.h"

namespace walsh::testing {

class HandCache {
 public:
  // Room for `n_sequences` of `n_tokens` each.
  HandCache(const ModelConfig& config, int64_t n_tokens, int64_t n_sequences = 1)
      : n_left_(engine::KvBlocks(n_tokens) * n_sequences),
        pool_(engine::KvPool::Create(
                  {.n_layers = config.n_layers, .kv_width = config.kv_width(), .n_blocks = n_left_})
                  .value()) {}

  const engine::KvPool* pool() const { return &pool_; }
  // Blocks for one sequence, from the end, so that no table is the identity.
  std::vector<engine::BlockId> Take(int64_t n_tokens) {
    std::vector<engine::BlockId> blocks;
    for (int64_t i = 0; i < engine::KvBlocks(n_tokens); ++i) {
      blocks.push_back(static_cast<engine::BlockId>(--n_left_));
    }
    return blocks;
  }

 private:
  int64_t n_left_;
  engine::KvPool pool_;
};

}  // namespace walsh::testing
