// The KV cache of the CUDA engine: its pool of blocks, and which blocks a batch's sequences have.
//
// Layout:  of a layer [n_blocks][keys, values][n_kv_heads][head]. A head's part of a block is
//          [kPoolBlockTokens][head_dim] values of bf16; where they are quantized it is
//          [kPoolBlockTokens][head_dim] codes, and behind them [kPoolBlockTokens][n_groups] grids.
//          An attention kernel takes one kv head of a sequence at a time: the keys that it reads of
//          a block lie together (4 KiB at a head_dim of 128 in bf16), as whole lines of the cache
//          and of DRAM and with one look into the table, and so do the values. A block is
//          contiguous, to be copied or given away at once.
// Codes:   unsigned, of 8 bits in their order, or of 4: of 8 neighbours the even ones are the low
//          half of 32 bits and the odd ones the high half, the first lowest, so that one mask takes
//          two neighbours.
// Grids:   a value is scale · (code − zero), an element of kernels::FakeQuantize's asymmetric grid.
//          32 bits: those of a float that is the scale but for its lowest 8, which are the zero.
//          The scale has 16 bits of precision then, far more than a product in bf16 keeps.
// Batch:   what kernels know of it lies in device memory in one piece of int32, so that one copy
//          updates it and a CUDA graph can be replayed with other lengths: nothing that changes
//          from step to step is an argument of a launch.
// Errors:  INVALID_ARGUMENT names the thing, the limit and the value
// Threads: no state; what is packed is written by one thread
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "worker/kernels/params.h"

namespace walsh::kernels::cuda {

using bf16 = __nv_bfloat16;

inline constexpr int kPoolBlockTokens = static_cast<int>(kKvBlockTokens);
// Tables are read four entries at a time.
inline constexpr int64_t kTableAlignment = 4;

// How keys and values are stored.
struct KvForm {
  static constexpr int kBf16 = 16;
  static constexpr int64_t kHead = 0;
  int bits = kBf16;            // or 8 or 4, of codes
  int64_t group_size = kHead;  // of a head's values, how many share a grid: all, or so many
  float clip = 1;              // of a group's largest value, that its grid reaches

  bool is_quantized() const { return bits != kBf16; }
  int64_t n_groups(int64_t head_dim) const {
    return group_size == kHead ? 1 : head_dim / group_size;
  }
  // Of a token's keys (or values) of one head.
  int64_t code_bytes(int64_t head_dim) const { return head_dim * bits / 8; }
  int64_t grid_bytes(int64_t head_dim) const {
    return is_quantized() ? n_groups(head_dim) * static_cast<int64_t>(sizeof(uint32_t)) : 0;
  }
};
// UNIMPLEMENTED, and why, where no kernel takes heads of this size in this form. Quantized: heads
// of 32, 64, 96, 128 or 256; groups of a whole head, or of 32, 64 or 128 that divide half of one.
absl::Status CheckKvForm(const KvForm& form, int64_t head_dim);

struct KvPoolShape {
  int64_t n_blocks = 0;
  int64_t n_kv_heads = 0;
  int64_t head_dim = 0;
  KvForm form = {};

  // Values of a block are half a block after its keys; grids of a head's part behind its codes.
  int64_t codes_bytes() const { return kPoolBlockTokens * form.code_bytes(head_dim); }
  int64_t head_bytes() const {
    return codes_bytes() + kPoolBlockTokens * form.grid_bytes(head_dim);
  }
  int64_t block_bytes() const { return 2 * n_kv_heads * head_bytes(); }
  int64_t size_bytes() const { return n_blocks * block_bytes(); }
};

// A layer's part of the pool.
struct KvPoolLayer {
  void* data = nullptr;  // shape.size_bytes() bytes, aligned to 16
  KvPoolShape shape;
};

// A sequence of a batch, on the host. Its rows of the batch are its tokens n_past, n_past + 1, …
struct KvSequence {
  int64_t first_row = 0;
  int64_t n_rows = 0;              // 0: takes a place in the batch and no part in it
  int64_t n_past = 0;              // tokens whose keys and values are in the pool
  std::span<const int32_t> table;  // blocks of all its tokens, n_past + n_rows at least
};

// The same for kernels, in device memory.
struct KvBatch {
  int64_t n_sequences = 0;
  int64_t n_rows = 0;                        // of the batch, some perhaps of no sequence
  int64_t max_blocks = 0;                    // of a table, a multiple of kTableAlignment
  const int32_t* first_row = nullptr;        // [n_sequences]
  const int32_t* n_sequence_rows = nullptr;  // [n_sequences]
  const int32_t* n_past = nullptr;           // [n_sequences]
  const int32_t* sequence_of_row = nullptr;  // [n_rows]; −1: none
  const int32_t* tables = nullptr;           // [n_sequences, max_blocks], aligned to 16 bytes

  // Sequences [first, first + n) for attention, as those that decode and those that prefill are
  // apart. Rows are numbered as before.
  KvBatch Sequences(int64_t first, int64_t n) const;
};

// How a KvBatch lies in its piece of memory.
struct KvBatchLayout {
  int64_t n_sequences = 0;  // at most; the others have no rows
  int64_t n_rows = 0;       // at most; the others are of no sequence
  int64_t max_blocks = 0;

  int64_t size() const;  // int32
  // `data` has size() int32 in device memory, aligned to 16 bytes.
  KvBatch View(const int32_t* data) const;
  // Writes the host's image of it to `to`, size() int32. `n_blocks` is the pool's.
  absl::Status Pack(std::span<const KvSequence> sequences, int64_t n_blocks,
                    std::span<int32_t> to) const;
};

}  // namespace walsh::kernels::cuda
