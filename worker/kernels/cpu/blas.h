// OpenBLAS, loaded at first use so that its core type can be chosen before it starts.
//
// OpenBLAS 0.3.21 takes CPUs newer than itself for a Prescott and then multiplies five times slower
// than it could. Its core type comes from the environment, which it reads when it is loaded: hence
// dlopen instead of linking. It runs single-threaded (the result would depend on its thread count);
// callers run fixed tiles in parallel instead.
//
// Measured on a Zen 4 EPYC (2 vCPU, AVX-512 VNNI), OpenBLAS 0.3.21, sgemm: see docs of
// tests/bench/cpu_kernels_bench.cc.
//
// Errors:  FAILED_PRECONDITION  libopenblas.so.0 is not installed or lacks a function
// Threads: safe beside each other; the first call sets environment variables, so a daemon makes it
//          before it starts threads that might read them
#pragma once

#include <string>

#include "absl/status/statusor.h"

namespace walsh::kernels::cpu {

// CBLAS's and LAPACK's own names and conventions; ints are 32-bit.
enum CblasOrder : int { kRowMajor = 101 };
enum CblasTranspose : int { kNoTrans = 111, kTrans = 112 };
enum CblasTriangle : int { kUpper = 121, kLower = 122 };

struct Blas {
  // C[m, n] = alpha · op(A)[m, k] · op(B)[k, n] + beta · C
  void (*sgemm)(CblasOrder order, CblasTranspose trans_a, CblasTranspose trans_b, int m, int n,
                int k, float alpha, const float* a, int lda, const float* b, int ldb, float beta,
                float* c, int ldc) = nullptr;
  // One triangle of C[n, n] = alpha · op(A) · op(A)ᵀ + beta · C, A [n, k] or, transposed, [k, n].
  void (*ssyrk)(CblasOrder order, CblasTriangle triangle, CblasTranspose trans, int n, int k,
                float alpha, const float* a, int lda, float beta, float* c, int ldc) = nullptr;
  void (*spotrf)(const char* triangle, const int* n, float* a, const int* lda, int* info) = nullptr;
  void (*dpotrf)(const char* triangle, const int* n, double* a, const int* lda,
                 int* info) = nullptr;
  void (*strtri)(const char* triangle, const char* unit, const int* n, float* a, const int* lda,
                 int* info) = nullptr;
  void (*dtrtri)(const char* triangle, const char* unit, const int* n, double* a, const int* lda,
                 int* info) = nullptr;
  std::string version;  // "OpenBLAS 0.3.21"
  std::string core;     // the kernels that it runs: "SkylakeX"
};

// The same object in every call.
absl::StatusOr<const Blas*> OpenBlas();

}  // namespace walsh::kernels::cpu
