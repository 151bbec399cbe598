// A model or a text in an object store: its objects, and copies of them on this machine's disk.
//
// A source is one object, such as a GGUF file or a text, or a folder of objects that is a model:
// the files of worker/io/hf_directory.h that are there, and model.safetensors or the shards that
// its index names. Lists are hostile: of what they say only sizes and ETags of these names are
// used.
//
// Errors:  NOT_FOUND            nothing is there, or no model: names what is missing
//          INVALID_ARGUMENT     too many objects, or one beyond the limits of worker/io
//          FAILED_PRECONDITION  the endpoint refuses this worker (SOURCE_REFUSED)
//          UNAVAILABLE          the endpoint is away, or an object was replaced since it was listed
//          DATA_LOSS            the endpoint's answers cannot be true
//          those of the disk; whatever the caller's KeepGoing or CopyProgress says
// Messages name the source as the caller does, and never the endpoint.
// Threads: safe on distinct directories.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/keep_going.h"
#include "worker/objects/object_store.h"

namespace walsh::service {

struct RemoteSource {
  struct File {
    std::string name;
    objects::ObjectStore::Listed object;
  };
  std::string reference;  // for messages
  const objects::ObjectStore* store = nullptr;
  std::string name;  // the last part of the key
  bool is_folder = false;
  std::vector<File> files;

  int64_t size_bytes() const;
  // Whether it has weights, whose headers tell much.
  bool is_model() const;
  // SHA-256 of all of the above but the store: another one where anything was replaced.
  std::string Fingerprint() const;
  // Of a copy in `directory`.
  std::string PathIn(const std::string& directory) const { return directory + "/" + name; }
};

// What `key` is in `store`, which outlives the result.
absl::StatusOr<RemoteSource> FindRemoteSource(const objects::ObjectStore& store,
                                              const std::string& key, const std::string& reference,
                                              const KeepGoing& keep_going);

// Called before and after each piece, and at least about once a second while one is waited for.
using CopyProgress = std::function<absl::Status(int64_t bytes_done, int64_t bytes_total)>;

// Into `directory`, which is empty.
absl::Status CopySource(const RemoteSource& source, const std::string& directory,
                        const CopyProgress& progress);
// A model without its weights, for who wants to plan and not to read them: files have their sizes
// and, of weights, only their headers. Those of a GGUF file do not say how long they are; they are
// taken to end within 64 MiB.
absl::Status CopyHeaders(const RemoteSource& source, const std::string& directory,
                         const CopyProgress& progress);

}  // namespace walsh::service
