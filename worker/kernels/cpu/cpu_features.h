// Which instruction sets this machine has; asked once.
#pragma once

namespace walsh::kernels::cpu {

struct CpuFeatures {
  bool avx2_fma = false;     // AVX2, FMA and F16C
  bool avx512 = false;       // AVX-512 F, BW, DQ and VL
  bool avx512_vnni = false;  // the above and VNNI
};

const CpuFeatures& GetCpuFeatures();

}  // namespace walsh::kernels::cpu
