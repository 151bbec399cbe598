#include "worker/service/artifact_store.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/log.h"
#include "common/publish.h"
#include "common/resource_name.h"
#include "common/sha256.h"
#include "common/status_macros.h"
#include "worker/io/bounded_json.h"
#include "worker/io/output_file.h"
#include "worker/io/random_access_file.h"

namespace walsh::service {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using objects::Expected;
using objects::ObjectStore;

constexpr int kFormatVersion = 1;
constexpr int64_t kEntryBytesMax = 1 << 20;
constexpr size_t kFilesMax = 10'000;
constexpr size_t kDigestChars = 64;

using Files = std::map<std::string, Expected>;  // by name

struct Entry {
  ArtifactStore::Origin origin;
  Files files;
};

std::string Folder(const std::string& id) { return absl::StrCat("models/", id); }
std::string EntryKey(const std::string& id) { return Folder(id) + "/model.json"; }
std::string ObjectsFolder(const std::string& id) { return Folder(id) + "/objects"; }
std::string ObjectKey(const std::string& id, const std::string& sha256) {
  return absl::StrCat(ObjectsFolder(id), "/", sha256);
}

std::string ToText(const Entry& entry) {
  json files = json::object();
  for (const auto& [name, file] : entry.files) {
    files[name] = {{"size_bytes", file.size_bytes}, {"sha256", file.sha256}};
  }
  const json document = {{"format_version", kFormatVersion},
                         {"job", entry.origin.job_name},
                         {"fencing_token", entry.origin.fencing_token},
                         {"files", std::move(files)}};
  return document.dump(2) + "\n";
}

// Names become paths of this machine.
bool IsFileName(const std::string& name) {
  return !name.starts_with('.') && objects::CheckKey(name).ok() &&
         name.find('/') == std::string::npos;
}
bool IsDigest(const std::string& text) {
  return text.size() == kDigestChars && std::all_of(text.begin(), text.end(), [](char c) {
           return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
         });
}

absl::StatusOr<Entry> FromText(const std::string& text) {
  try {
    const json document = json::parse(text);
    Entry entry;
    if (Int64Of(document.at("format_version")) != kFormatVersion) {
      return absl::UnimplementedError("a stored model is of another version of walsh");
    }
    entry.origin.job_name = document.at("job").get<std::string>();
    const std::optional<int64_t> token = Int64Of(document.at("fencing_token"));
    if (!token.has_value()) return absl::DataLossError("a stored model has no fencing token");
    entry.origin.fencing_token = *token;
    for (const auto& [name, file] : document.at("files").items()) {
      Expected expected{.size_bytes = Int64Of(file.at("size_bytes")).value_or(-1),
                        .sha256 = file.at("sha256").get<std::string>()};
      if (!IsFileName(name) || !IsDigest(expected.sha256) || expected.size_bytes < 0 ||
          entry.files.size() == kFilesMax) {
        return absl::DataLossError("the files of a stored model cannot be what they say");
      }
      entry.files[name] = std::move(expected);
    }
    return entry;
  } catch (const json::exception& e) {
    return absl::DataLossError(absl::StrCat("a stored model: ", e.what()));
  }
}

absl::StatusOr<Entry> ReadEntry(const ObjectStore& store, const std::string& id,
                                const KeepGoing& keep_going) {
  const absl::StatusOr<ObjectStore::Contents> text =
      store.Get(EntryKey(id), kEntryBytesMax, keep_going);
  if (absl::IsNotFound(text.status())) return NotFound("model", ModelName(id));
  WALSH_RETURN_IF_ERROR(text.status());
  return FromText(text->bytes);
}

absl::StatusOr<Expected> Digest(const std::string& path, const KeepGoing& keep_going) {
  WALSH_ASSIGN_OR_RETURN(const auto file, OpenRandomAccessFile(path));
  std::vector<std::byte> buffer(static_cast<size_t>(std::min(file->size(), objects::kPieceBytes)));
  Sha256 hash;
  for (int64_t offset = 0; offset < file->size();) {
    WALSH_RETURN_IF_ERROR(Ask(keep_going));
    const auto piece = std::span(buffer).first(
        static_cast<size_t>(std::min(file->size() - offset, objects::kPieceBytes)));
    WALSH_RETURN_IF_ERROR(file->ReadAt(offset, piece));
    hash.Update(piece.data(), piece.size());
    offset += static_cast<int64_t>(piece.size());
  }
  return Expected{.size_bytes = file->size(), .sha256 = hash.HexDigest()};
}

absl::StatusOr<Files> DigestsOf(const std::string& directory, const KeepGoing& keep_going) {
  Files files;
  std::error_code error;
  for (fs::directory_iterator it(directory, error), end; !error && it != end; it.increment(error)) {
    const std::string name = it->path().filename().string();
    if (!it->is_regular_file(error) || !IsFileName(name)) {
      return absl::FailedPreconditionError(absl::StrCat("'", name, "' is no file of an artifact"));
    }
    WALSH_ASSIGN_OR_RETURN(files[name], Digest(it->path().string(), keep_going));
  }
  if (error) return ErrnoStatus(error.value(), "listing an artifact");
  return files;
}

// OK where the store has just these files under the name.
absl::Status CheckSame(const ObjectStore& store, const std::string& id, const Files& files,
                       const KeepGoing& keep_going) {
  WALSH_ASSIGN_OR_RETURN(const Entry there, ReadEntry(store, id, keep_going));
  const auto is_same = [](const Files::value_type& a, const Files::value_type& b) {
    return a.first == b.first && a.second.sha256 == b.second.sha256;
  };
  if (std::equal(there.files.begin(), there.files.end(), files.begin(), files.end(), is_same)) {
    return absl::OkStatus();
  }
  return StoredAlready(id);
}

absl::Status FetchFile(const ObjectStore& store, const std::string& key, const Expected& expected,
                       const std::string& path, const KeepGoing& keep_going) {
  WALSH_ASSIGN_OR_RETURN(const auto output, OutputFile::Create(path));
  std::vector<std::byte> buffer(
      static_cast<size_t>(std::min(expected.size_bytes, objects::kPieceBytes)));
  const auto place = [&](int64_t, int64_t n_bytes) {
    return std::span(buffer).first(static_cast<size_t>(n_bytes));
  };
  const auto write = [&](std::span<const std::byte> piece) -> absl::Status {
    WALSH_RETURN_IF_ERROR(output->Append(piece));
    return Ask(keep_going);
  };
  WALSH_RETURN_IF_ERROR(objects::ReadVerified(store, key, expected, place, write, keep_going));
  return output->Finish();
}

}  // namespace

absl::Status StoredAlready(const std::string& id) {
  absl::Status status = absl::AlreadyExistsError(
      absl::StrCat(ModelName(id),
                   " exists already in the artifact store, made by another job; "
                   "delete it to use its name"));
  SetErrorInfo(status, "MODEL_EXISTS");
  SetResourceInfo(status, "model", ModelName(id), "exists already");
  return status;
}

ArtifactStore::ArtifactStore(std::unique_ptr<ObjectStore> objects) : objects_(std::move(objects)) {}

absl::Status ArtifactStore::Keep(const std::string& id, const std::string& directory,
                                 const Origin& origin, const KeepGoing& keep_going) {
  WALSH_ASSIGN_OR_RETURN(const Files files, DigestsOf(directory, keep_going));
  if (const absl::Status there = CheckSame(*objects_, id, files, keep_going);
      !absl::IsNotFound(there)) {
    return there;
  }
  WALSH_ASSIGN_OR_RETURN(const std::vector<ObjectStore::Listed> listed,
                         objects_->List(ObjectsFolder(id), keep_going));
  std::map<std::string, int64_t> there;
  for (const ObjectStore::Listed& object : listed) there[object.key] = object.size_bytes;
  std::map<std::string, int64_t> needed;
  for (const auto& [name, file] : files) {
    const std::string key = ObjectKey(id, file.sha256);
    if (!needed.emplace(key, file.size_bytes).second) continue;
    // The endpoint has compared the digest of what it took.
    if (const auto it = there.find(key); it != there.end() && it->second == file.size_bytes)
      continue;
    WALSH_RETURN_IF_ERROR(
        objects_->PutFile(key, absl::StrCat(directory, "/", name), file.sha256, keep_going));
  }
  WALSH_RETURN_IF_ERROR(Ask(keep_going));
  const absl::Status put =
      objects_
          ->Put(EntryKey(id), ToText({.origin = origin, .files = files}), {.must_be_absent = true})
          .status();
  // Another holder of the job was faster, or this write took place and its answer was lost.
  if (absl::IsAborted(put)) return CheckSame(*objects_, id, files, keep_going);
  WALSH_RETURN_IF_ERROR(put);
  for (const auto& [key, size_bytes] : there) {
    if (needed.contains(key)) continue;
    if (const absl::Status removed = objects_->Delete(key); !removed.ok()) {
      WALSH_LOG(Warning, "an object that no model needs stays", {"model", id}, {"error", removed});
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<ArtifactStore::Origin> ArtifactStore::Find(const std::string& id,
                                                          const KeepGoing& keep_going) const {
  WALSH_ASSIGN_OR_RETURN(const Entry entry, ReadEntry(*objects_, id, keep_going));
  return entry.origin;
}

absl::StatusOr<ArtifactStore::Origin> ArtifactStore::Fetch(const std::string& id,
                                                           const std::string& directory,
                                                           const KeepGoing& keep_going) const {
  WALSH_ASSIGN_OR_RETURN(const Entry entry, ReadEntry(*objects_, id, keep_going));
  WALSH_RETURN_IF_ERROR(MakeDirectories(directory));
  for (const auto& [name, file] : entry.files) {
    WALSH_RETURN_IF_ERROR(Ask(keep_going));
    const absl::Status fetched = FetchFile(*objects_, ObjectKey(id, file.sha256), file,
                                           absl::StrCat(directory, "/", name), keep_going);
    if (absl::IsNotFound(fetched)) {
      return absl::DataLossError(absl::StrCat(ModelName(id), ": ", name, " is not stored"));
    }
    WALSH_RETURN_IF_ERROR(fetched);
  }
  return entry.origin;
}

absl::Status ArtifactStore::Remove(const std::string& id) {
  WALSH_ASSIGN_OR_RETURN(const std::vector<ObjectStore::Listed> listed, objects_->List(Folder(id)));
  if (listed.empty()) return NotFound("model", ModelName(id));
  // First what makes it a model.
  WALSH_RETURN_IF_ERROR(objects_->Delete(EntryKey(id)));
  for (const ObjectStore::Listed& object : listed) {
    WALSH_RETURN_IF_ERROR(objects_->Delete(object.key));
  }
  return absl::OkStatus();
}

}  // namespace walsh::service
