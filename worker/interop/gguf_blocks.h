// Quantized linears as ggml's blocks of 32 weights, where those hold them exactly.
//
//   Q4_0  w = d · (q − 8)   4 bits, every zero 8
//   Q4_1  w = d · q + m     4 bits, m = −d · zero where half precision holds that
//   Q8_0  w = d · q         8 bits, code − zero within −128 … 127
//
// A group of 64 or more weights repeats its scale in each of its blocks. Nothing is rounded: ggml
// computes in float32, where each of these expressions is exact.
//
// Source:  ggml's block layouts (ggml-common.h); golden against the Python package gguf
// Errors:  FAILED_PRECONDITION  no type holds the matrix; says which value it cannot hold, and why
// Threads: safe.
#pragma once

#include <cstddef>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/io/storage_type.h"
#include "worker/tensor/quantized_matrix.h"

namespace walsh::interop {

// The smallest of the three types that holds it.
absl::StatusOr<StorageType> GgufTypeOf(const QuantizedMatrix& matrix);

// The blocks of one row, in the type that GgufTypeOf gave. `bytes` is resized.
void EncodeGgufRow(const QuantizedMatrix& matrix, StorageType type, int64_t row,
                   std::vector<std::byte>& bytes);

}  // namespace walsh::interop
