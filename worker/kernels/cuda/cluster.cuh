// Thread block clusters (compute 9.0 and later): CTAs that run at once and write to one another's
// shared memory.
//
// Who is written to says beforehand how many bytes will come (BeginExchange) and waits for them
// (WaitForBytes) at a barrier of its own, which lasts for one such exchange. Nobody else waits, and
// no fence stands in the way of other loads and stores. A CTA may write only when the other one has
// begun and made its barrier: arrive and wait of all threads of all CTAs of the cluster see to it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "worker/kernels/cuda/mma.cuh"

namespace walsh::kernels::cuda {

// By one thread, before ArriveAtCluster. `bytes` of the barrier's exchange, all writers together.
__device__ __forceinline__ void BeginExchange(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\n"
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n"
      "fence.mbarrier_init.release.cluster;\n" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
}
// By whoever reads them.
__device__ __forceinline__ void WaitForBytes(const uint64_t* barrier) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(SharedAddress(barrier))
      : "memory");
}

// By whole warps. What the CTA read of its shared memory before is read before others write there.
__device__ __forceinline__ void ArriveAtCluster() {
  __threadfence_block();
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void WaitForCluster() {
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Both, and what was written before is seen by all.
__device__ __forceinline__ void SyncCluster() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Where `p` of this CTA's shared memory lies in that of the cluster's CTA `rank`.
__device__ __forceinline__ unsigned AddressInCta(const void* p, int rank) {
  unsigned address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(SharedAddress(p)), "r"(rank));
  return address;
}
// To a CTA's `address`; its `barrier` counts the bytes.
__device__ __forceinline__ void StoreInCluster(unsigned address, float4 x, unsigned barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(address),
      "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void StoreInCluster(unsigned address, float2 x, unsigned barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
          address),
      "f"(x.x), "f"(x.y), "r"(barrier)
      : "memory");
}

}  // namespace walsh::kernels::cuda
