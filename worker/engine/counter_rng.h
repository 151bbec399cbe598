// Random numbers that are a function of a seed and a position, so that a request's tokens do not
// depend on what else runs beside it.
//
// Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", Philox4x32-10.
#pragma once

#include <array>
#include <cstdint>

namespace walsh::engine {

// The block of four 32-bit words at `counter` of the stream that `key` names.
constexpr std::array<uint32_t, 4> Philox4x32(std::array<uint32_t, 4> counter,
                                             std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * counter[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter[2];
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key[0],
               static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key[1],
               static_cast<uint32_t>(product0)};
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return counter;
}

// Uniform in [0, 1) with 53 bits: number `position` of the stream of `seed`.
constexpr double UniformAt(uint64_t seed, uint64_t position) {
  const std::array<uint32_t, 4> block =
      Philox4x32({static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0},
                 {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
  const uint64_t bits = (uint64_t{block[0]} << 32 | block[1]) >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

}  // namespace walsh::engine
