// Where a worker keeps what must outlive it: objects by key, whole or absent, in a folder or in a
// bucket of an S3-compatible endpoint.
//
// A write replaces an object in one step, and may ask that the key is empty or that its object
// still is of a version that was seen before: so writers of one key find out about each other
// without a lock. Nothing is cached.
//
// Keys: one to eight parts between slashes, each of letters, digits, '-', '_' and '.', and
//       beginning with none of the last; a key is never the beginning of another's folder.
// Errors:  NOT_FOUND           no such object
//          ABORTED             a condition does not hold. Also of a write that took place but whose
//                              answer was lost: who must know looks what is there
//          whatever a caller's KeepGoing says
//          DATA_LOSS           contents differ from their digest or size
//          RESOURCE_EXHAUSTED  no space, a quota, or more than a limit that the caller has set
//          PERMISSION_DENIED, UNAVAILABLE (also after its own tries), UNIMPLEMENTED (an endpoint
//          without conditional writes), CANCELLED after Stop
// Threads: safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/keep_going.h"

namespace walsh::objects {

// What is read or written at a time.
inline constexpr int64_t kPieceBytes = int64_t{32} << 20;

// What a write asks of what is there; both unset: nothing.
struct WriteCondition {
  bool must_be_absent = false;
  std::string must_be_version = {};
};

// What a read asks of what is there.
struct ReadOptions {
  std::string must_have_etag = {};  // Listed::etag; empty: any
  KeepGoing keep_going = {};        // also asked while the read waits for an endpoint
};

class ObjectStore {
 public:
  struct Contents {
    std::string bytes;
    std::string version;
  };
  struct Listed {
    std::string key;
    int64_t size_bytes = 0;
    absl::Time modified;
    // Another one after each write, but not always Contents::version. Empty: the endpoint gives
    // none.
    std::string etag;
  };
  virtual ~ObjectStore() = default;

  // All of an object that has at most `bytes_max`.
  virtual absl::StatusOr<Contents> Get(const std::string& key, int64_t bytes_max,
                                       const KeepGoing& keep_going = {}) const = 0;
  // Fills `into` from `offset` on.
  virtual absl::Status ReadAt(const std::string& key, int64_t offset, std::span<std::byte> into,
                              const ReadOptions& options = {}) const = 0;
  // The new version. With a condition at most kPieceBytes.
  virtual absl::StatusOr<std::string> Put(const std::string& key, std::string_view contents,
                                          const WriteCondition& condition = {}) = 0;
  // DATA_LOSS, and nothing is written, where the file does not have that digest. Asks `keep_going`
  // between pieces.
  virtual absl::Status PutFile(const std::string& key, const std::string& path,
                               const std::string& sha256, const KeepGoing& keep_going) = 0;
  // Objects whose keys begin with `folder` and a slash, by key. Asks `keep_going` as ReadAt.
  virtual absl::StatusOr<std::vector<Listed>> List(const std::string& folder,
                                                   const KeepGoing& keep_going = {}) const = 0;
  // What a list would say of one object.
  virtual absl::StatusOr<Listed> Find(const std::string& key,
                                      const KeepGoing& keep_going = {}) const = 0;
  // OK where there is none.
  virtual absl::Status Delete(const std::string& key) = 0;
  // Calls that run or come later end soon.
  virtual void Stop() = 0;
};

// In `directory`, which is made and may be shared by the workers of a file system. A write that
// waits longer than that for another's is UNAVAILABLE.
absl::StatusOr<std::unique_ptr<ObjectStore>> OpenDirectoryStore(
    const std::string& directory, absl::Duration lock_timeout = absl::Seconds(30));

// `location`: file:DIR or s3://BUCKET[/PREFIX]. For the latter the environment says more
// (worker/objects/s3_options.h). `flag` is for messages.
absl::StatusOr<std::unique_ptr<ObjectStore>> OpenObjectStore(std::string_view flag,
                                                             const std::string& location);

// Reads an object of known size and digest by pieces: each into what `place` gives for
// (offset, bytes), then shown to `use`. DATA_LOSS where it is another.
struct Expected {
  int64_t size_bytes = 0;
  std::string sha256;
};
absl::Status ReadVerified(
    const ObjectStore& store, const std::string& key, const Expected& expected,
    const std::function<std::span<std::byte>(int64_t offset, int64_t n_bytes)>& place,
    const std::function<absl::Status(std::span<const std::byte>)>& use,
    const KeepGoing& keep_going = {});

absl::Status CheckKey(const std::string& key);

}  // namespace walsh::objects
