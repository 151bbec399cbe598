// Every operation that runs on a device, declared once.
//
// Each has up to three implementations with this signature: walsh::kernels::ref (double
// accumulation, written for reading: the specification), ::cpu (SIMD and BLAS) and ::cuda. The
// functions here run the one of the stream's device. They validate first (INVALID_ARGUMENT names
// the field), allocate nothing but small scratch, and sum in a fixed order: the same inputs give
// the same bytes with any number of threads.
#pragma once

#include <span>
#include <string>

#include "absl/status/status.h"
#include "worker/kernels/packed_matrix.h"
#include "worker/kernels/params.h"
#include "worker/kernels/thread_pool.h"

namespace walsh::kernels {

enum class Backend { kRef, kCpu };

// Where an operation runs.
struct Stream {
  Backend backend = Backend::kCpu;
  ThreadPool* pool = nullptr;  // null: the calling thread alone
};

#define WALSH_FOR_EACH_KERNEL(X) \
  X(Matmul)                      \
  X(Gram)                        \
  X(CrossGram)                   \
  X(SubtractProduct)             \
  X(RmsNorm)                     \
  X(Rope)                        \
  X(Attention)                   \
  X(SiluMultiply)                \
  X(GeluMultiply)                \
  X(Add)                         \
  X(BlockWalsh)                  \
  X(FakeQuantize)                \
  X(CrossEntropy)                \
  X(KlDivergence)                \
  X(PackedMatmul)

#define WALSH_DECLARE_KERNEL(Op)                                   \
  absl::Status Op(const Op##Params& params, const Stream& stream); \
  namespace ref {                                                  \
  absl::Status Op(const Op##Params& params, const Stream& stream); \
  }                                                                \
  namespace cpu {                                                  \
  absl::Status Op(const Op##Params& params, const Stream& stream); \
  }
WALSH_FOR_EACH_KERNEL(WALSH_DECLARE_KERNEL)
#undef WALSH_DECLARE_KERNEL

// Several sequences, or several matrices, in one parallel region; each as if it were alone. The
// matrices of PackedMatmulBatch share their x, x_stride and n_tokens, which are rounded once.
#define WALSH_DECLARE_BATCH(Op)                                                    \
  absl::Status Op##Batch(std::span<const Op##Params> items, const Stream& stream); \
  namespace cpu {                                                                  \
  absl::Status Op##Batch(std::span<const Op##Params> items, const Stream& stream); \
  }
WALSH_DECLARE_BATCH(Attention)
WALSH_DECLARE_BATCH(PackedMatmul)
#undef WALSH_DECLARE_BATCH

// What the CPU backend chose on this machine: "AVX-512 VNNI; OpenBLAS 0.3.21 core SkylakeX".
std::string DescribeCpuBackend();

// Symmetric positive definite factorizations through LAPACK, single-threaded and deterministic; n ×
// n row-major, in place. FAILED_PRECONDITION when not positive definite.
//   lower: A = L Lᵀ (the strict upper part is zeroed).
absl::Status CholeskyLower(int64_t n, float* a);
absl::Status CholeskyLower(int64_t n, double* a);
//   In-place inverse of a lower triangular matrix.
absl::Status InvertLower(int64_t n, float* a);
absl::Status InvertLower(int64_t n, double* a);

}  // namespace walsh::kernels
