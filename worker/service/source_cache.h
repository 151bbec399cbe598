// Copies of what lies elsewhere: folders by key, whole or absent, that go again, the one that was
// not used for longest first, where others need their room.
//
// Each is a folder <root>/<key> that appears by one rename. Names that begin with a dot are
// temporary, and removed when the cache is opened, which one process does at a time.
//
// Errors:  FAILED_PRECONDITION  larger than all of the cache (SOURCE_TOO_LARGE)
//          RESOURCE_EXHAUSTED   there is no room beside what is in use, or on the disk
//                               (INSUFFICIENT_DISK)
//          those of filling a folder and of the file system
// Threads: safe.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/keep_going.h"
#include "common/publish.h"

namespace walsh::service {

class SourceCache {
 public:
  // A folder that stays while this lives. The cache outlives it.
  class Pin {
   public:
    Pin(Pin&& other) noexcept
        : cache_(std::exchange(other.cache_, nullptr)), key_(std::move(other.key_)) {}
    Pin& operator=(Pin&&) = delete;
    ~Pin() {
      if (cache_ != nullptr) cache_->Unpin(key_);
    }
    std::string directory() const { return cache_->Directory(key_); }

   private:
    friend class SourceCache;
    Pin(SourceCache* cache, std::string key) : cache_(cache), key_(std::move(key)) {}
    SourceCache* cache_;
    std::string key_;
  };

  // In `root`, which is made; all folders together have at most `bytes_max`. `free_bytes` says what
  // the disk of a path has left.
  using FreeDisk = std::function<absl::StatusOr<int64_t>(const std::string& path)>;
  static absl::StatusOr<std::unique_ptr<SourceCache>> Open(std::string root, int64_t bytes_max,
                                                           FreeDisk free_bytes = FreeBytes);

  // Whether so much could ever be here.
  absl::Status CheckFits(int64_t size_bytes) const;
  // NOT_FOUND unless the folder is there.
  absl::StatusOr<Pin> Find(const std::string& key);
  // The folder of this key, of SHA-256's form. Where it is not there `fill` writes `size_bytes`
  // into an empty one; another caller of the same key waits for that, and asks `keep_going`.
  using Fill = std::function<absl::Status(const std::string& directory)>;
  absl::StatusOr<Pin> Get(const std::string& key, int64_t size_bytes, const Fill& fill,
                          const KeepGoing& keep_going);
  // An empty folder of the caller's, which removes it.
  absl::StatusOr<std::string> MakeTemporaryDirectory() const;

 private:
  struct Entry {
    int64_t size_bytes = 0;
    int64_t used = 0;  // grows with each use of any
    int n_pins = 0;
    bool is_whole = false;  // false: it is being filled
    std::string temporary;  // where
    bool may_go() const { return is_whole && n_pins == 0; }
  };
  // Bytes for one folder more.
  struct Room {
    int64_t in_cache = 0;
    int64_t on_disk = 0;
    int64_t evictable = 0;  // as many more in both
  };
  using Entries = std::map<std::string, Entry>;

  SourceCache(std::string root, int64_t bytes_max, FreeDisk free_bytes)
      : root_(std::move(root)), bytes_max_(bytes_max), free_bytes_(std::move(free_bytes)) {}
  std::string Directory(const std::string& key) const { return root_ + "/" + key; }
  absl::Status Scan();
  absl::Status FillNew(const std::string& key, const std::string& temporary,
                       const Fill& fill) const;
  // OK where an operator has done so. What is there is never half a folder.
  absl::Status RemoveFolder(const std::string& key) const;
  void Unpin(const std::string& key);
  // The rest with `mu_` held.
  Entries::iterator FindEntry(const std::string& key);
  Pin MakePin(Entries::value_type& entry);
  absl::StatusOr<Room> CountRoom() const;
  absl::Status MakeRoom(int64_t size_bytes);
  // Of what may go, which there is.
  absl::Status RemoveOldest();

  const std::string root_;
  const int64_t bytes_max_;
  const FreeDisk free_bytes_;
  std::mutex mu_;
  std::condition_variable filled_;
  Entries entries_;  // guarded by mu_, as what follows
  int64_t n_uses_ = 0;
};

}  // namespace walsh::service
