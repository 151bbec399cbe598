#include "common/kv_cache_dtype.h"

#include <string>

#include "absl/strings/str_cat.h"

namespace walsh {

absl::StatusOr<KvCacheDtype> ParseKvCacheDtype(std::string_view text) {
  if (text == "auto") return KvCacheDtype::kAuto;
  if (text == "bf16") return KvCacheDtype::kBf16;
  if (text == "int8") return KvCacheDtype::kInt8;
  if (text == "int4") return KvCacheDtype::kInt4;
  return absl::InvalidArgumentError(
      absl::StrCat("--kv-cache-dtype '", std::string(text), "' is not auto, bf16, int8 or int4"));
}

}  // namespace walsh
