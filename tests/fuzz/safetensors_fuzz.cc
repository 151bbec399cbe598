// ParseSafetensors: what it accepts covers the file's data without gap or overlap, and each size is
// what shape and dtype give.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "tests/fuzz/json_mutator.h"
#include "tests/fuzz/mutate_bytes.h"
#include "tests/fuzz/refusal.h"
#include "tests/testing/checkpoint_bytes.h"
#include "worker/io/safetensors.h"

namespace walsh::fuzz {
namespace {

constexpr size_t kLengthBytes = 8;

void CheckEntries(const std::vector<SafetensorsEntry>& entries, int64_t data_begin,
                  int64_t file_bytes) {
  std::unordered_set<std::string> names;
  int64_t end = data_begin;
  for (const SafetensorsEntry& entry : entries) {
    WALSH_CHECK(names.insert(entry.name).second);
    WALSH_CHECK_EQ(entry.offset, end);
    int64_t bytes = SafetensorsDtypeBytes(entry.dtype);
    for (const int64_t dim : entry.shape) bytes *= dim;
    WALSH_CHECK_EQ(entry.size_bytes, bytes);
    end += entry.size_bytes;
  }
  WALSH_CHECK_EQ(end, file_bytes);
}

// Another value in the header, with a length that still is the header's.
size_t Mutate(uint8_t* data, size_t size, size_t size_max, uint32_t seed) {
  uint64_t header_bytes = 0;
  if (size >= kLengthBytes) std::memcpy(&header_bytes, data, kLengthBytes);
  if (seed % 4 == 0 || size < kLengthBytes || header_bytes > size - kLengthBytes) {
    return LLVMFuzzerMutate(data, size, size_max);
  }
  const std::string_view bytes(reinterpret_cast<const char*>(data) + kLengthBytes,
                               size - kLengthBytes);
  const auto header = MutateJson(bytes.substr(0, header_bytes), seed / 4);
  if (!header) return LLVMFuzzerMutate(data, size, size_max);
  const std::string mutated =
      testing::SafetensorsBytes(*header, bytes.substr(static_cast<size_t>(header_bytes)));
  return Deliver(mutated, data, size_max);
}

}  // namespace
}  // namespace walsh::fuzz

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t size_max,
                                          unsigned int seed) {
  return walsh::fuzz::Mutate(data, size, size_max, seed);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto file = walsh::MemoryFile("fuzz.safetensors", std::as_bytes(std::span(data, size)));
  const auto entries = walsh::ParseSafetensors(*file);
  if (!entries.ok()) {
    walsh::fuzz::CheckRefusal(entries.status(),
                              {absl::StatusCode::kInvalidArgument, absl::StatusCode::kDataLoss,
                               absl::StatusCode::kUnimplemented});
    return 0;
  }
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, data, sizeof(header_bytes));
  walsh::fuzz::CheckEntries(*entries,
                            static_cast<int64_t>(walsh::fuzz::kLengthBytes + header_bytes),
                            static_cast<int64_t>(size));
  return 0;
}
