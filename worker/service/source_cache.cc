#include "worker/service/source_cache.h"

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/log.h"
#include "common/publish.h"
#include "common/status_macros.h"
#include "worker/service/disk_check.h"

namespace walsh::service {
namespace {

namespace fs = std::filesystem;

constexpr std::chrono::milliseconds kAskInterval{100};

}  // namespace

absl::StatusOr<std::unique_ptr<SourceCache>> SourceCache::Open(std::string root, int64_t bytes_max,
                                                               FreeDisk free_bytes) {
  WALSH_RETURN_IF_ERROR(MakeDirectories(root));
  std::unique_ptr<SourceCache> cache(
      new SourceCache(std::move(root), bytes_max, std::move(free_bytes)));
  WALSH_RETURN_IF_ERROR(cache->Scan());
  return cache;
}

absl::Status SourceCache::Scan() {
  struct Found {
    fs::file_time_type used;
    std::string key;
    int64_t size_bytes;
  };
  std::vector<Found> found;
  std::error_code error;
  for (fs::directory_iterator it(root_, error), end; !error && it != end; it.increment(error)) {
    const std::string name = it->path().filename().string();
    if (name.starts_with('.')) {
      WALSH_RETURN_IF_ERROR(RemoveTree(it->path().string()));
      continue;
    }
    if (!it->is_directory(error)) continue;
    WALSH_ASSIGN_OR_RETURN(const int64_t size_bytes, TreeBytes(it->path().string()));
    found.push_back({it->last_write_time(error), name, size_bytes});
  }
  if (error) return ErrnoStatus(error.value(), "list the cache of sources");
  std::sort(found.begin(), found.end(),
            [](const Found& a, const Found& b) { return a.used < b.used; });
  for (Found& folder : found) {
    entries_[std::move(folder.key)] = {
        .size_bytes = folder.size_bytes, .used = ++n_uses_, .is_whole = true};
  }
  return absl::OkStatus();
}

absl::Status SourceCache::CheckFits(int64_t size_bytes) const {
  if (size_bytes <= bytes_max_) return absl::OkStatus();
  absl::Status status = absl::FailedPreconditionError(
      absl::StrCat("the source has ", size_bytes, " bytes, this worker keeps at most ", bytes_max_,
                   " (--source-cache-bytes)"));
  SetErrorInfo(status, "SOURCE_TOO_LARGE");
  return status;
}

absl::StatusOr<SourceCache::Pin> SourceCache::Find(const std::string& key) {
  const std::lock_guard lock(mu_);
  const auto it = FindEntry(key);
  if (it == entries_.end() || !it->second.is_whole) {
    return absl::NotFoundError("the source is not in the cache");
  }
  return MakePin(*it);
}

absl::StatusOr<SourceCache::Pin> SourceCache::Get(const std::string& key, int64_t size_bytes,
                                                  const Fill& fill, const KeepGoing& keep_going) {
  std::unique_lock lock(mu_);
  for (auto it = FindEntry(key); it != entries_.end(); it = FindEntry(key)) {
    if (it->second.is_whole) return MakePin(*it);
    filled_.wait_for(lock, kAskInterval);
    lock.unlock();
    WALSH_RETURN_IF_ERROR(Ask(keep_going));
    lock.lock();
  }
  WALSH_RETURN_IF_ERROR(MakeRoom(size_bytes));
  WALSH_ASSIGN_OR_RETURN(const std::string temporary, MakeTemporaryDirectory());
  Entries::value_type& entry =
      *entries_.emplace(key, Entry{.size_bytes = size_bytes, .temporary = temporary}).first;
  // Also where `fill` throws, or others would wait for ever.
  const absl::Cleanup end_wait = [&] {
    if (!lock.owns_lock()) lock.lock();
    if (!entry.second.is_whole) entries_.erase(key);
    filled_.notify_all();
  };
  lock.unlock();
  WALSH_RETURN_IF_ERROR(FillNew(key, temporary, fill));
  lock.lock();
  entry.second.is_whole = true;
  return MakePin(entry);
}

absl::StatusOr<std::string> SourceCache::MakeTemporaryDirectory() const {
  std::string directory = TemporaryName(Directory("source"));
  WALSH_RETURN_IF_ERROR(MakeDirectories(directory));
  return directory;
}

absl::Status SourceCache::FillNew(const std::string& key, const std::string& temporary,
                                  const Fill& fill) const {
  absl::Cleanup remove = [&] {
    RemoveTree(temporary).IgnoreError();  // what stays goes at the next start
    // Where only the end of publishing failed.
    RemoveFolder(key).IgnoreError();
  };
  WALSH_RETURN_IF_ERROR(fill(temporary));
  WALSH_RETURN_IF_ERROR(PublishDirectory(temporary, Directory(key)));
  std::move(remove).Cancel();
  return absl::OkStatus();
}

absl::Status SourceCache::RemoveFolder(const std::string& key) const {
  const std::string doomed = TemporaryName(Directory("doomed"));
  const absl::Status moved = MoveDirectory(Directory(key), doomed);
  if (absl::IsNotFound(moved)) return absl::OkStatus();
  WALSH_RETURN_IF_ERROR(moved);
  return RemoveTree(doomed);
}

void SourceCache::Unpin(const std::string& key) {
  const std::lock_guard lock(mu_);
  --entries_.at(key).n_pins;
}

SourceCache::Entries::iterator SourceCache::FindEntry(const std::string& key) {
  const auto it = entries_.find(key);
  if (it == entries_.end() || !it->second.may_go()) return it;
  std::error_code error;
  if (fs::is_directory(Directory(key), error)) return it;
  // An operator has made room.
  entries_.erase(it);
  return entries_.end();
}

SourceCache::Pin SourceCache::MakePin(Entries::value_type& entry) {
  auto& [key, folder] = entry;
  ++folder.n_pins;
  folder.used = ++n_uses_;
  // For the next process. Where it fails, the folder goes earlier than it need.
  std::error_code error;
  fs::last_write_time(Directory(key), fs::file_time_type::clock::now(), error);
  return Pin(this, key);
}

absl::StatusOr<SourceCache::Room> SourceCache::CountRoom() const {
  WALSH_ASSIGN_OR_RETURN(const int64_t disk_bytes, free_bytes_(root_));
  Room room{.in_cache = bytes_max_, .on_disk = disk_bytes};
  for (const auto& [key, folder] : entries_) {
    room.in_cache -= folder.size_bytes;
    if (folder.may_go()) room.evictable += folder.size_bytes;
    if (folder.is_whole) continue;
    // What it has yet to write is not free. One that is not there has just been published.
    const int64_t written = TreeBytes(folder.temporary).value_or(folder.size_bytes);
    room.on_disk -= std::max<int64_t>(folder.size_bytes - written, 0);
  }
  return room;
}

absl::Status SourceCache::MakeRoom(int64_t size_bytes) {
  WALSH_RETURN_IF_ERROR(CheckFits(size_bytes));
  while (true) {
    WALSH_ASSIGN_OR_RETURN(const Room room, CountRoom());
    if (size_bytes <= std::min(room.in_cache, room.on_disk)) return absl::OkStatus();
    // Nothing goes where all of it would not be enough.
    WALSH_RETURN_IF_ERROR(CheckDisk("the source within --source-cache-bytes", size_bytes,
                                    room.in_cache + room.evictable, root_));
    WALSH_RETURN_IF_ERROR(
        CheckDisk("the source", size_bytes, room.on_disk + room.evictable, root_));
    WALSH_RETURN_IF_ERROR(RemoveOldest());
  }
}

absl::Status SourceCache::RemoveOldest() {
  auto oldest = entries_.end();
  for (auto it = entries_.begin(); it != entries_.end(); ++it) {
    if (!it->second.may_go()) continue;
    if (oldest == entries_.end() || it->second.used < oldest->second.used) oldest = it;
  }
  WALSH_RETURN_IF_ERROR(RemoveFolder(oldest->first));
  WALSH_LOG(Info, "a source leaves the cache", {"bytes", oldest->second.size_bytes});
  entries_.erase(oldest);
  return absl::OkStatus();
}

}  // namespace walsh::service
