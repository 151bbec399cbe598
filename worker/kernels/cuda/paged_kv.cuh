// A batch's sequences and the pool's blocks as attention kernels see them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "worker/kernels/cuda/paged_kv.h"
#include "worker/kernels/cuda/reduce.cuh"

namespace walsh::kernels::cuda {

// Items of work are numbered sequence by sequence. Finds the sequence of an item and the item's
// number in it, for items that are asked for in their order; all lanes of a warp call.
class SequenceSearch {
 public:
  // `n_items(s)` are those of sequence s. False: there are fewer items.
  template <typename Count>
  __device__ __forceinline__ bool Find(int item, int n_sequences, const Count& n_items,
                                       int* sequence, int* item_of_sequence) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    for (; first_ < n_sequences; first_ += kWarpSize) {
      const int n = first_ + lane < n_sequences ? n_items(first_ + lane) : 0;
      int end = n;  // of this lane's sequence
#pragma unroll
      for (int offset = 1; offset < kWarpSize; offset *= 2) {
        const int below = __shfl_up_sync(~0u, end, offset);
        if (lane >= offset) end += below;
      }
      const unsigned is_after = __ballot_sync(~0u, item < before_ + end);
      if (is_after != 0) {
        const int found = __ffs(static_cast<int>(is_after)) - 1;
        *sequence = first_ + found;
        *item_of_sequence = item - before_ - __shfl_sync(~0u, end - n, found);
        return true;
      }
      before_ += __shfl_sync(~0u, end, kWarpSize - 1);
    }
    return false;
  }

 private:
  int first_ = 0;   // sequence of lane 0
  int before_ = 0;  // items of the sequences before it
};

}  // namespace walsh::kernels::cuda
