#include "worker/tokenizer/protobuf_wire.h"

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"

namespace walsh {

absl::StatusOr<uint64_t> WireReader::Varint() {
  uint64_t value = 0;
  for (int shift = 0; shift < 64; shift += 7) {
    if (rest_.empty()) return absl::InvalidArgumentError("truncated in a varint");
    const uint8_t byte = static_cast<uint8_t>(rest_.front());
    rest_.remove_prefix(1);
    value |= static_cast<uint64_t>(byte & 0x7F) << shift;
    if ((byte & 0x80) == 0) return value;
  }
  return absl::InvalidArgumentError("a varint of more than 10 bytes");
}

absl::StatusOr<std::string_view> WireReader::Take(uint64_t n_bytes) {
  if (n_bytes > rest_.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("truncated: a field of ", n_bytes, " bytes, ", rest_.size(), " are left"));
  }
  const std::string_view taken = rest_.substr(0, n_bytes);
  rest_.remove_prefix(n_bytes);
  return taken;
}

absl::StatusOr<uint64_t> WireReader::Fixed(size_t n_bytes) {
  WALSH_ASSIGN_OR_RETURN(const std::string_view bytes, Take(n_bytes));
  uint64_t value = 0;
  for (size_t i = n_bytes; i > 0; --i) value = value << 8 | static_cast<uint8_t>(bytes[i - 1]);
  return value;
}

absl::StatusOr<WireField> WireReader::Next() {
  WALSH_ASSIGN_OR_RETURN(const uint64_t tag, Varint());
  WireField field;
  field.number = static_cast<uint32_t>(tag >> 3);
  if (tag >> 3 == 0 || tag >> 3 > 0x1FFFFFFF) {
    return absl::InvalidArgumentError(absl::StrCat("field number ", tag >> 3));
  }
  field.type = static_cast<WireField::Type>(tag & 7);
  switch (field.type) {
    case WireField::Type::kVarint: {
      WALSH_ASSIGN_OR_RETURN(field.value, Varint());
      return field;
    }
    case WireField::Type::kFixed64: {
      WALSH_ASSIGN_OR_RETURN(field.value, Fixed(8));
      return field;
    }
    case WireField::Type::kFixed32: {
      WALSH_ASSIGN_OR_RETURN(field.value, Fixed(4));
      return field;
    }
    case WireField::Type::kBytes: {
      WALSH_ASSIGN_OR_RETURN(const uint64_t size, Varint());
      WALSH_ASSIGN_OR_RETURN(field.bytes, Take(size));
      return field;
    }
  }
  return absl::InvalidArgumentError(
      absl::StrCat("field ", field.number, " has wire type ", tag & 7));
}

}  // namespace walsh
