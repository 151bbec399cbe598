// Protocol-buffer wire format, read field by field from untrusted bytes.
//
// For the one message that walsh reads from a stranger's file, SentencePiece's model: its library
// brings a second protobuf with it, and a field walk needs no generated code.
//
// Source:  the protocol-buffers documentation, "Encoding".
// Errors:  INVALID_ARGUMENT  truncated, an over-long varint, a group, field number 0
// Threads: one reader is used by one thread.
#pragma once

#include <bit>
#include <cstdint>
#include <string_view>

#include "absl/status/statusor.h"

namespace walsh {

struct WireField {
  enum class Type { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };
  uint32_t number = 0;
  Type type = Type::kVarint;
  uint64_t value = 0;      // kVarint, kFixed64, kFixed32
  std::string_view bytes;  // kBytes: strings and messages; into the reader's text

  float AsFloat() const { return std::bit_cast<float>(static_cast<uint32_t>(value)); }
};

class WireReader {
 public:
  explicit WireReader(std::string_view message) : rest_(message) {}
  bool done() const { return rest_.empty(); }
  absl::StatusOr<WireField> Next();

 private:
  absl::StatusOr<uint64_t> Varint();
  absl::StatusOr<uint64_t> Fixed(size_t n_bytes);
  absl::StatusOr<std::string_view> Take(uint64_t n_bytes);

  std::string_view rest_;
};

}  // namespace walsh
