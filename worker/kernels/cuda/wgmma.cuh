// Warpgroup products of bf16 (PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions"), A in
// registers, B in shared memory: d[64, n] (+)= a[64, 16] · b[n, 16]ᵀ with n = 2 · elements of d.
//
// Only for sm_90a: code for other devices must not get here (WALSH_HAS_WGMMA).
//
// Of A, warp w of the four has rows 16 w to 16 w + 15, as in mma.m16n8k16; of the result, its lane
// has rows 16 w + lane / 4 (d[4 i], d[4 i + 1]) and 8 more (d[4 i + 2], d[4 i + 3]), columns
// 8 i + lane % 4 · 2 and the next.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define WALSH_HAS_WGMMA 1
#endif

namespace walsh::kernels::cuda {

inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kWgmmaRows = 64;
// A row of B in shared memory: 64 elements, of which a product takes 16. Eight rows are 1,024
// bytes, aligned to them; the 16 bytes c of row r lie at c ^ (r % 8) ("128B swizzle").
inline constexpr int kWgmmaRowBytes = 128;

#ifdef WALSH_HAS_WGMMA

// Of rows that begin at `address` in shared memory.
__device__ __forceinline__ uint64_t DescribeRows(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = uint64_t{8 * kWgmmaRowBytes / 16} << 32;
  constexpr uint64_t kUnused = uint64_t{1} << 16;  // the other stride, of layouts without swizzle
  return kSwizzle128 | kEightRows | kUnused | (address & 0x3FFFF) >> 4;
}
// `bytes` further.
__device__ __forceinline__ uint64_t Advance(uint64_t rows, int bytes) {
  return rows + static_cast<uint64_t>(bytes / 16);
}

// Before the first product, and before those whose registers other instructions wrote since.
__device__ __forceinline__ void BeginProducts() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Before that: keeps what computes them from being moved behind it.
template <int kCount>
__device__ __forceinline__ void PinRegisters(uint32_t (&values)[kCount]) {
#pragma unroll
  for (uint32_t& value : values) asm volatile("" : "+r"(value)::"memory");
}
// Behind WaitForProducts: keeps what reads the sums from being moved before it.
template <int kCount>
__device__ __forceinline__ void PinRegisters(float (&values)[kCount]) {
#pragma unroll
  for (float& value : values) asm volatile("" : "+f"(value)::"memory");
}
__device__ __forceinline__ void CommitProducts() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until all but the last kPending commits are done; registers of the others may be read and
// written.
template <int kPending>
__device__ __forceinline__ void WaitForProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// By all warps of a warpgroup: what each lane may have from here on.
template <int kRegisters>
__device__ __forceinline__ void RaiseRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void LowerRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// clang-format off
#define WALSH_D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define WALSH_D16(i) WALSH_D8(i), WALSH_D8(i + 8)
#define WALSH_D32(i) WALSH_D16(i), WALSH_D16(i + 16)
// clang-format on
__device__ __forceinline__ void MultiplyAdd(float (&d)[8], const uint32_t* a, uint64_t b,
                                            bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %13, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, p, 1, 1, 0;}"
      : WALSH_D8(0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));
}
__device__ __forceinline__ void MultiplyAdd(float (&d)[16], const uint32_t* a, uint64_t b,
                                            bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "{%16, %17, %18, %19}, %20, p, 1, 1, 0;}"
      : WALSH_D16(0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));
}
__device__ __forceinline__ void MultiplyAdd(float (&d)[32], const uint32_t* a, uint64_t b,
                                            bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, p, 1, 1, 0;}"
      : WALSH_D32(0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));
}
__device__ __forceinline__ void MultiplyAdd(float (&d)[64], const uint32_t* a, uint64_t b,
                                            bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, p, 1, 1, 0;}"
      : WALSH_D32(0), WALSH_D32(32)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));
}
__device__ __forceinline__ void MultiplyAdd(float (&d)[128], const uint32_t* a, uint64_t b,
                                            bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %133, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, "
      "%127}, "
      "{%128, %129, %130, %131}, %132, p, 1, 1, 0;}"
      : WALSH_D32(0), WALSH_D32(32), WALSH_D32(64), WALSH_D32(96)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));
}
#undef WALSH_D32
#undef WALSH_D16
#undef WALSH_D8

#endif  // WALSH_HAS_WGMMA

}  // namespace walsh::kernels::cuda
