// Quantized weights in the layout that the products of the CUDA engine read, made on the device
// when a model is loaded.
//
// The rows are cut into tiles of 16 and the columns into blocks of 128. A tile's block is one
// contiguous piece: its codes and, behind them, the scales and zeros (or codebooks) of its rows, so
// that one copy brings all that a product needs; serving_codes.h says where each code lies. A grid
// of more than 128 columns is in each of its blocks, which costs 64 bytes a block. The tiles of a
// block of columns follow one another, and the blocks: a warp keeps its activations and walks down
// the rows. The last tile and block are filled up with weights that no output reads or that meet
// activations of zero.
//
// Linears that share their input may be stacked, and two of one size (gate and up) interleaved by 8
// rows, so that a lane of a warp holds both rows of a pair.
//
// Rows and columns may be taken in another order than they are stored in: columns whose groups are
// no neighbours (act-order) so that they are, and rows so that what reads the product finds its
// inputs in an order that it wants.
//
// Bound:   memory: codes are read and written once
// Shapes:  as docs/artifact-format.md has them: W[rows, cols], rows are outputs
// Errors:  INVALID_ARGUMENT  sizes that do not fit together, named with their limit
//          UNIMPLEMENTED     a group that is none of 32, 64, a multiple of 128 and the whole row; a
//                            codebook of other than 2 bits
//          RESOURCE_EXHAUSTED
// Threads: asynchronous on the given stream; a matrix that has been built is read by any number
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/kernels/cuda/device_buffer.h"

namespace walsh::kernels::cuda {

// Changes with every change of the layout. It is made at load and never stored, so that nothing
// has to read another version; what caches it beyond a process must compare.
inline constexpr int kServingLayoutVersion = 2;

enum class ServingRows {
  kStacked,     // those of the first linear, then those of the second, …
  kInterleaved  // 8 of the first of two linears, 8 of the second, …
};

struct ServingShape {
  int64_t rows = 0;  // of all linears
  int64_t cols = 0;  // a multiple of 8
  int bits = 4;      // 2, 3, 4 or 8
  // Columns of a group: 32, 64 or a multiple of 128; or cols. The last may be shorter.
  int64_t group_size = 128;
  bool has_codebook = false;
  bool has_float_zeros = false;  // they may be no integers
  ServingRows order = ServingRows::kStacked;

  int64_t row_tiles() const;
  int64_t col_blocks() const;
  // Groups of columns that a block has: 1, 2 or 4.
  int grids_in_block() const;
  // Blocks that share a grid; 1 where a block has several.
  int64_t blocks_of_grid() const;
  int64_t block_bytes() const;
  // Row of the tiles (16 · tile + row of the tile) of row r of the stacked linears.
  int64_t PlaceOfRow(int64_t r) const;
};

// INVALID_ARGUMENT or UNIMPLEMENTED where no such matrix can be.
absl::Status ValidateServingShape(const ServingShape& shape);

// One linear in the artifact's form, in device memory: qweight with either qzeros and scales,
// scales and zeros, or levels.
struct StoredLinear {
  int64_t rows = 0;
  const uint32_t* qweight = nullptr;   // [cols / 32 · bits, rows]
  const uint32_t* qzeros = nullptr;    // [groups, rows / 32 · bits]
  const __half* scales = nullptr;      // [groups, rows]
  const __half* zeros = nullptr;       // [groups, rows]
  const __half* levels = nullptr;      // [groups, rows, 4]
  const int32_t* row_order = nullptr;  // [rows]: row r of the matrix is stored as row row_order[r]
};
inline constexpr int kServingLinearsMax = 4;

class ServingMatrix {
 public:
  // `linears` have one input, width, group and kind of grid; cols must be a multiple of 32.
  struct Source {
    std::span<const StoredLinear> linears;
    int64_t cols = 0;
    int bits = 4;
    int64_t group_size = 128;
    ServingRows order = ServingRows::kStacked;
    // [cols] on the device: column c of the matrix is stored as column column_order[c], and its
    // group is c / group_size; null: c. Not checked to be a permutation, nor is row_order.
    const int32_t* column_order = nullptr;
  };
  static absl::StatusOr<ServingMatrix> Build(const Source& source, cudaStream_t stream);

  // Rounds a dense matrix (the head) to 8 bits in groups of 128 columns: scale = max |w| / 127 as a
  // half, code = 128 + w / scale to nearest, zero 128. `first_bad` (device) becomes the least index
  // of a weight that is not finite where that is less than what it holds; set it to INT64_MAX
  // before.
  struct Dense {
    int64_t rows = 0;
    int64_t cols = 0;
    const __nv_bfloat16* weights = nullptr;  // [rows, cols]
    int64_t* first_bad = nullptr;
  };
  static absl::StatusOr<ServingMatrix> Quantize(const Dense& dense, cudaStream_t stream);

  const ServingShape& shape() const { return shape_; }
  // [col_blocks, row_tiles, block_bytes]
  const uint8_t* blocks() const { return blocks_.data(); }
  // What a product reads: bits · rows · cols / 8 and the grids.
  int64_t size_bytes() const { return blocks_.size_bytes(); }

  // The way back, exactly what the product multiplies by: codes and weights [rows, cols] in the
  // stacked order; either may be null.
  absl::Status Unpack(uint8_t* codes, float* weights, cudaStream_t stream) const;
  // The same weights rounded to bf16, [rows, cols] aligned to 8 bytes: at the speed of memory, for
  // products of so many tokens that they are worth it.
  absl::Status Dequantize(__nv_bfloat16* weights, cudaStream_t stream) const;

 private:
  static absl::StatusOr<ServingMatrix> Allocate(const ServingShape& shape, cudaStream_t stream);

  ServingShape shape_;
  DeviceBuffer<uint8_t> blocks_;
};

}  // namespace walsh::kernels::cuda
