#include "worker/service/remote_source.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <deque>
#include <filesystem>
#include <future>
#include <map>
#include <span>
#include <string_view>
#include <system_error>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "common/publish.h"
#include "common/sha256.h"
#include "common/status_macros.h"
#include "worker/interop/gptq_checkpoint.h"
#include "worker/io/hf_directory.h"
#include "worker/io/output_file.h"

namespace walsh::service {
namespace {

using objects::kPieceBytes;
using objects::ObjectStore;

// One connection has a small part of what a machine's network can.
constexpr size_t kReadsAhead = 4;
constexpr std::chrono::milliseconds kAskInterval{100};
constexpr absl::Duration kRetryDelay = absl::Seconds(5);
// A file of safetensors begins with the length of its header.
constexpr int64_t kLengthBytes = 8;
constexpr int64_t kGgufHeadBytes = 64 << 20;

bool IsGguf(std::string_view name) { return name.ends_with(".gguf"); }
bool IsSafetensors(std::string_view name) { return name.ends_with(".safetensors"); }

std::string Quoted(const std::string& reference) { return absl::StrCat("'", reference, "'"); }

absl::Status Missing(const std::string& reference, const std::string& what) {
  absl::Status status = absl::NotFoundError(absl::StrCat(Quoted(reference), " ", what));
  SetResourceInfo(status, "source", reference, what);
  return status;
}

absl::Status Away(const std::string& message) {
  absl::Status status = absl::UnavailableError(message);
  SetRetryDelay(status, kRetryDelay);
  return status;
}

// What the store says of a source, as this worker's callers may know it.
absl::Status OfSource(const std::string& reference, const absl::Status& status,
                      const KeepGoing& keep_going) {
  // If so, that is why.
  WALSH_RETURN_IF_ERROR(Ask(keep_going));
  const std::string message = absl::StrCat(Quoted(reference), ": ", status.message());
  switch (status.code()) {
    case absl::StatusCode::kNotFound:
      return Missing(reference, "does not exist");
    case absl::StatusCode::kAborted:
      return Away(absl::StrCat(Quoted(reference), " was replaced while it was read"));
    case absl::StatusCode::kCancelled:
    case absl::StatusCode::kUnavailable:
      return Away(message);
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kPermissionDenied:
    case absl::StatusCode::kUnimplemented: {
      // It is about this worker and the endpoint, not about the caller's rights.
      absl::Status refused = absl::FailedPreconditionError(message);
      SetErrorInfo(refused, "SOURCE_REFUSED");
      return refused;
    }
    default:
      return absl::Status(status.code(), message);
  }
}

// The limits of who will read the file.
int64_t BytesMax(std::string_view name, bool is_folder) {
  if (IsGguf(name) || (is_folder && IsSafetensors(name))) return limits::kArtifactFileBytesMax;
  return is_folder ? limits::kJsonFileBytesMax : limits::kCalibrationFileBytesMax;
}

absl::Status AddFile(std::string name, ObjectStore::Listed object, RemoteSource& source) {
  const int64_t bytes_max = BytesMax(name, source.is_folder);
  if (object.size_bytes > bytes_max) {
    return absl::InvalidArgumentError(absl::StrCat(Quoted(source.reference), ": ", name, " has ",
                                                   object.size_bytes, " bytes, at most ", bytes_max,
                                                   " are read"));
  }
  if (object.etag.empty()) {
    return absl::DataLossError(
        absl::StrCat(Quoted(source.reference), ": the object store gives no ETag for ", name));
  }
  source.files.push_back({.name = std::move(name), .object = std::move(object)});
  return absl::OkStatus();
}

class FolderReader {
 public:
  FolderReader(RemoteSource* source, const KeepGoing* keep_going)
      : source_(*source), keep_going_(*keep_going) {}

  absl::Status Read(const std::string& key) {
    WALSH_RETURN_IF_ERROR(List(key));
    WALSH_RETURN_IF_ERROR(AddNeeded("config.json"));
    for (const char* const name : SideFileNames()) WALSH_RETURN_IF_ERROR(AddIfThere(name));
    WALSH_RETURN_IF_ERROR(AddIfThere(interop::kOldConfigFile));
    if (children_.contains(kSingleWeightsFile)) return AddNeeded(kSingleWeightsFile);
    if (!children_.contains(kWeightsIndexFile)) {
      return Missing(source_.reference,
                     absl::StrCat("has neither ", kSingleWeightsFile, " nor ", kWeightsIndexFile));
    }
    WALSH_RETURN_IF_ERROR(AddNeeded(kWeightsIndexFile));
    WALSH_ASSIGN_OR_RETURN(const std::string index, ReadAll(source_.files.back().object));
    WALSH_ASSIGN_OR_RETURN(const WeightMap map, ParseWeightMap(index));
    WALSH_ASSIGN_OR_RETURN(const std::vector<std::string> shards, ShardsOf(map));
    for (const std::string& shard : shards) WALSH_RETURN_IF_ERROR(AddNeeded(shard));
    return absl::OkStatus();
  }

 private:
  absl::Status List(const std::string& key) {
    absl::StatusOr<std::vector<ObjectStore::Listed>> listed = source_.store->List(key, keep_going_);
    if (absl::IsResourceExhausted(listed.status())) {
      return absl::InvalidArgumentError(
          absl::StrCat(Quoted(source_.reference), ": ", listed.status().message()));
    }
    if (!listed.ok()) return OfSource(source_.reference, listed.status(), keep_going_);
    if (listed->empty()) return OfSource(source_.reference, absl::NotFoundError(""), keep_going_);
    for (ObjectStore::Listed& object : *listed) {
      std::string name = object.key.substr(key.size() + 1);
      if (name.find('/') != std::string::npos) continue;
      if (!children_.emplace(name, std::move(object)).second) {
        return absl::DataLossError(
            absl::StrCat(Quoted(source_.reference), ": the object store lists ", name, " twice"));
      }
    }
    return absl::OkStatus();
  }

  // At most once: config.json is asked for twice.
  absl::Status AddIfThere(const std::string& name) {
    auto child = children_.extract(name);
    if (child.empty()) return absl::OkStatus();
    return AddFile(name, std::move(child.mapped()), source_);
  }
  absl::Status AddNeeded(const std::string& name) {
    if (children_.contains(name)) return AddIfThere(name);
    return Missing(source_.reference, absl::StrCat("has no ", name));
  }

  absl::StatusOr<std::string> ReadAll(const ObjectStore::Listed& object) const {
    std::string contents(static_cast<size_t>(object.size_bytes), '\0');
    const absl::Status read =
        source_.store->ReadAt(object.key, 0, std::as_writable_bytes(std::span(contents)),
                              {.must_have_etag = object.etag, .keep_going = keep_going_});
    if (!read.ok()) return OfSource(source_.reference, read, keep_going_);
    return contents;
  }

  RemoteSource& source_;
  const KeepGoing& keep_going_;
  std::map<std::string, ObjectStore::Listed> children_;  // by name
};

// Copies objects of a source and counts.
class Copier {
 public:
  Copier(const RemoteSource& source, const std::string& directory, const CopyProgress& progress)
      : source_(source), directory_(directory), progress_(progress), total_(source.size_bytes()) {}

  absl::Status Copy(bool with_weights) {
    if (source_.is_folder) WALSH_RETURN_IF_ERROR(MakeDirectories(source_.PathIn(directory_)));
    for (const RemoteSource::File& file : source_.files) {
      const bool is_whole = with_weights || !(IsGguf(file.name) || IsSafetensors(file.name));
      int64_t n_bytes = file.object.size_bytes;
      if (!is_whole) {
        WALSH_ASSIGN_OR_RETURN(n_bytes, HeadBytes(file));
      }
      WALSH_RETURN_IF_ERROR(CopyBeginning(file, n_bytes));
    }
    return absl::OkStatus();
  }

 private:
  absl::Status GoOn() const { return progress_ ? progress_(done_, total_) : absl::OkStatus(); }

  absl::StatusOr<int64_t> HeadBytes(const RemoteSource::File& file) const {
    const int64_t size_bytes = file.object.size_bytes;
    if (IsGguf(file.name)) return std::min(size_bytes, kGgufHeadBytes);
    // What has no length is refused by who parses it.
    if (size_bytes < kLengthBytes) return size_bytes;
    uint64_t header_bytes = 0;
    std::array<std::byte, kLengthBytes> length;
    WALSH_RETURN_IF_ERROR(ReadAt(file, 0, length));
    std::memcpy(&header_bytes, length.data(), length.size());
    header_bytes =
        std::min(header_bytes, static_cast<uint64_t>(limits::kSafetensorsHeaderBytesMax));
    return std::min(size_bytes, kLengthBytes + static_cast<int64_t>(header_bytes));
  }

  absl::Status ReadAt(const RemoteSource::File& file, int64_t offset,
                      std::span<std::byte> into) const {
    const KeepGoing go_on = [this] { return GoOn(); };
    const absl::Status read = source_.store->ReadAt(
        file.object.key, offset, into, {.must_have_etag = file.object.etag, .keep_going = go_on});
    return read.ok() ? read : OfSource(source_.reference, read, go_on);
  }

  absl::Status CopyBeginning(const RemoteSource::File& file, int64_t n_bytes) {
    const std::string path = absl::StrCat(source_.PathIn(directory_),
                                          source_.is_folder ? absl::StrCat("/", file.name) : "");
    WALSH_ASSIGN_OR_RETURN(const auto output, OutputFile::Create(path));
    WALSH_RETURN_IF_ERROR(ReadBeginning(file, n_bytes, *output));
    WALSH_RETURN_IF_ERROR(output->Finish());
    if (n_bytes == file.object.size_bytes) return absl::OkStatus();
    std::error_code error;
    std::filesystem::resize_file(path, static_cast<uintmax_t>(file.object.size_bytes), error);
    return error ? ErrnoStatus(error.value(), "making a file") : absl::OkStatus();
  }

  // Pieces are read ahead, each on a thread of its own.
  absl::Status ReadBeginning(const RemoteSource::File& file, int64_t n_bytes, OutputFile& output) {
    std::atomic<bool> is_over = false;
    const objects::ReadOptions options = {
        .must_have_etag = file.object.etag, .keep_going = [&is_over] {
          return is_over ? absl::CancelledError("nobody waits for it") : absl::OkStatus();
        }};
    const auto read = [&](int64_t offset, int64_t n) -> absl::StatusOr<std::string> {
      std::string piece(static_cast<size_t>(n), '\0');
      WALSH_RETURN_IF_ERROR(source_.store->ReadAt(
          file.object.key, offset, std::as_writable_bytes(std::span(piece)), options));
      return piece;
    };
    std::deque<std::future<absl::StatusOr<std::string>>> ahead;  // waits for its threads at the end
    const absl::Cleanup end = [&is_over] { is_over = true; };    // before that
    WALSH_RETURN_IF_ERROR(GoOn());
    for (int64_t asked = 0; asked < n_bytes || !ahead.empty();) {
      while (asked < n_bytes && ahead.size() < kReadsAhead) {
        const int64_t n = std::min(n_bytes - asked, kPieceBytes);
        ahead.push_back(std::async(std::launch::async, read, asked, n));
        asked += n;
      }
      while (ahead.front().wait_for(kAskInterval) != std::future_status::ready) {
        WALSH_RETURN_IF_ERROR(GoOn());
      }
      const absl::StatusOr<std::string> piece = ahead.front().get();
      ahead.pop_front();
      if (!piece.ok()) {
        return OfSource(source_.reference, piece.status(), [this] { return GoOn(); });
      }
      WALSH_RETURN_IF_ERROR(output.Append(std::as_bytes(std::span(*piece))));
      done_ += static_cast<int64_t>(piece->size());
      WALSH_RETURN_IF_ERROR(GoOn());
    }
    return absl::OkStatus();
  }

  const RemoteSource& source_;
  const std::string& directory_;
  const CopyProgress& progress_;
  const int64_t total_;
  int64_t done_ = 0;
};

}  // namespace

int64_t RemoteSource::size_bytes() const {
  int64_t sum = 0;
  for (const File& file : files) sum += file.object.size_bytes;
  return sum;
}

bool RemoteSource::is_model() const { return is_folder || IsGguf(name); }

std::string RemoteSource::Fingerprint() const {
  Sha256 hash;
  hash.Update(absl::StrCat(reference, "\n", name, "\n", is_folder ? "folder\n" : "object\n"));
  for (const File& file : files) {
    hash.Update(
        absl::StrCat(file.name, "\n", file.object.size_bytes, "\n", file.object.etag, "\n"));
  }
  return hash.HexDigest();
}

absl::StatusOr<RemoteSource> FindRemoteSource(const ObjectStore& store, const std::string& key,
                                              const std::string& reference,
                                              const KeepGoing& keep_going) {
  RemoteSource source{
      .reference = reference, .store = &store, .name = key.substr(key.rfind('/') + 1)};
  absl::StatusOr<ObjectStore::Listed> object = store.Find(key, keep_going);
  if (object.ok()) {
    WALSH_RETURN_IF_ERROR(AddFile(source.name, *std::move(object), source));
    return source;
  }
  if (!absl::IsNotFound(object.status())) return OfSource(reference, object.status(), keep_going);
  source.is_folder = true;
  WALSH_RETURN_IF_ERROR(FolderReader(&source, &keep_going).Read(key));
  return source;
}

absl::Status CopySource(const RemoteSource& source, const std::string& directory,
                        const CopyProgress& progress) {
  return Copier(source, directory, progress).Copy(/*with_weights=*/true);
}

absl::Status CopyHeaders(const RemoteSource& source, const std::string& directory,
                         const CopyProgress& progress) {
  return Copier(source, directory, progress).Copy(/*with_weights=*/false);
}

}  // namespace walsh::service
