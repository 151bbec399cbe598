// Thread block clusters (compute 9.0 and later): CTAs that run at once and see one another's shared
// memory.
//
// A CTA may write to another's only when that one has begun, and must not end before what others
// read of it: arrive and wait of all threads of all CTAs of the cluster see to both. What was
// written before an arrival is seen after the wait.
#pragma once

#include <cuda_runtime.h>

#include "worker/kernels/cuda/mma.cuh"

namespace walsh::kernels::cuda {

__device__ __forceinline__ void ArriveAtCluster() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
__device__ __forceinline__ void WaitForCluster() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// Where `p` of this CTA's shared memory lies in that of the cluster's CTA `rank`.
__device__ __forceinline__ unsigned AddressInCta(const void* p, int rank) {
  unsigned address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(SharedAddress(p)), "r"(rank));
  return address;
}
__device__ __forceinline__ void StoreInCluster(unsigned address, float4 x) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x.x),
               "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
}
__device__ __forceinline__ void StoreInCluster(unsigned address, float2 x) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x.x), "f"(x.y)
               : "memory");
}

}  // namespace walsh::kernels::cuda
