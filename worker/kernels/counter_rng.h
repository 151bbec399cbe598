// Random numbers that are a function of a seed and a position, so that a request's tokens do not
// depend on what else runs beside it, nor on the device.
//
// Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", Philox4x32-10.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define WALSH_ON_ANY_DEVICE __host__ __device__
#else
#define WALSH_ON_ANY_DEVICE
#endif

namespace walsh::kernels {

struct PhiloxBlock {
  uint32_t words[4];
  friend constexpr bool operator==(const PhiloxBlock&, const PhiloxBlock&) = default;
};
struct PhiloxKey {
  uint32_t words[2];
};

// The block at `counter` of the stream that `key` names.
WALSH_ON_ANY_DEVICE constexpr PhiloxBlock Philox4x32(PhiloxBlock counter, PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * counter.words[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter.words[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.words[1] ^ key.words[0],
                static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.words[3] ^ key.words[1],
                static_cast<uint32_t>(product0)}};
    key.words[0] += 0x9E3779B9u;
    key.words[1] += 0xBB67AE85u;
  }
  return counter;
}

// Uniform in [0, 1) with 53 bits: number `position` of the stream of `seed`.
WALSH_ON_ANY_DEVICE constexpr double UniformAt(uint64_t seed, uint64_t position) {
  const PhiloxBlock block =
      Philox4x32({{static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0}},
                 {{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)}});
  const uint64_t bits = (uint64_t{block.words[0]} << 32 | block.words[1]) >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

}  // namespace walsh::kernels

#undef WALSH_ON_ANY_DEVICE
