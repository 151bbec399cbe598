#include "worker/objects/object_store.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/sha256.h"
#include "common/status_macros.h"
#include "worker/objects/s3_object_store.h"
#include "worker/objects/s3_options.h"

namespace walsh::objects {
namespace {

constexpr std::string_view kFileScheme = "file:";
constexpr size_t kKeyPartsMax = 8;
constexpr size_t kKeyPartBytesMax = 128;

bool IsKeyPart(absl::string_view part) {
  return !part.empty() && part.size() <= kKeyPartBytesMax && part.front() != '.' &&
         std::all_of(part.begin(), part.end(), [](unsigned char c) {
           return std::isalnum(c) != 0 || c == '-' || c == '_' || c == '.';
         });
}

}  // namespace

absl::Status CheckKey(const std::string& key) {
  const std::vector<absl::string_view> parts = absl::StrSplit(key, '/');
  if (parts.size() <= kKeyPartsMax && std::all_of(parts.begin(), parts.end(), IsKeyPart)) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError("not the key of an object");
}

absl::StatusOr<std::unique_ptr<ObjectStore>> OpenObjectStore(std::string_view flag,
                                                             const std::string& location) {
  if (IsS3Location(location)) {
    WALSH_ASSIGN_OR_RETURN(S3Options options, S3OptionsFromEnvironment());
    S3Location place = SplitS3Location(location);
    options.bucket = std::move(place.bucket);
    options.prefix = std::move(place.key);
    return OpenS3Store(std::move(options));
  }
  if (location.starts_with(kFileScheme) && location.size() > kFileScheme.size()) {
    return OpenDirectoryStore(location.substr(kFileScheme.size()));
  }
  return absl::InvalidArgumentError(
      absl::StrCat(std::string(flag), " must be file:DIR or s3://BUCKET/PREFIX"));
}

absl::Status ReadVerified(
    const ObjectStore& store, const std::string& key, const Expected& expected,
    const std::function<std::span<std::byte>(int64_t offset, int64_t n_bytes)>& place,
    const std::function<absl::Status(std::span<const std::byte>)>& use,
    const KeepGoing& keep_going) {
  Sha256 hash;
  for (int64_t offset = 0; offset < expected.size_bytes;) {
    const int64_t n_bytes = std::min(expected.size_bytes - offset, kPieceBytes);
    const std::span<std::byte> piece = place(offset, n_bytes);
    WALSH_RETURN_IF_ERROR(store.ReadAt(key, offset, piece, {.keep_going = keep_going}));
    hash.Update(piece.data(), piece.size());
    WALSH_RETURN_IF_ERROR(use(piece));
    offset += n_bytes;
  }
  if (hash.HexDigest() == expected.sha256) return absl::OkStatus();
  return absl::DataLossError("a stored object differs from its digest");
}

}  // namespace walsh::objects
