// libFuzzer's own mutations, over strings. The replay has none: there they change nothing.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t size_max);

namespace walsh::fuzz {

// `bytes` with one change, at most `n_more` bytes longer.
inline std::string MutateBytes(std::string bytes, size_t n_more = 16) {
  const size_t size = bytes.size();
  bytes.resize(std::max<size_t>(1, size + n_more));  // libFuzzer wants room for a byte
  bytes.resize(LLVMFuzzerMutate(reinterpret_cast<uint8_t*>(bytes.data()), size, bytes.size()));
  return bytes;
}

// What LLVMFuzzerCustomMutator returns for a result that fits; 0, for the next try, else.
inline size_t Deliver(std::string_view bytes, uint8_t* data, size_t size_max) {
  if (bytes.size() > size_max) return 0;
  std::memcpy(data, bytes.data(), bytes.size());
  return bytes.size();
}

}  // namespace walsh::fuzz
