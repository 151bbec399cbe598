#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/keep_going.h"
#include "worker/objects/object_store.h"

namespace walsh::service {

// A store whose reads and lists a test sees first.
class WatchedStore final : public objects::ObjectStore {
 public:
  // 0 bytes: of a list.
  using OnRead =
      std::function<absl::Status(const std::string& key, size_t n_bytes, const KeepGoing&)>;
  // `on_read` outlives the store, and may be empty.
  WatchedStore(std::unique_ptr<objects::ObjectStore> store, const OnRead* on_read)
      : store_(std::move(store)), on_read_(*on_read) {}
  absl::StatusOr<Contents> Get(const std::string& key, int64_t bytes_max,
                               const KeepGoing& keep_going) const override {
    return store_->Get(key, bytes_max, keep_going);
  }
  absl::Status ReadAt(const std::string& key, int64_t offset, std::span<std::byte> into,
                      const objects::ReadOptions& options) const override {
    absl::Status status =
        on_read_ ? on_read_(key, into.size(), options.keep_going) : absl::OkStatus();
    return status.ok() ? store_->ReadAt(key, offset, into, options) : status;
  }
  absl::StatusOr<std::string> Put(const std::string& key, std::string_view contents,
                                  const objects::WriteCondition& condition) override {
    return store_->Put(key, contents, condition);
  }
  absl::Status PutFile(const std::string& key, const std::string& path, const std::string& sha256,
                       const KeepGoing& keep_going) override {
    return store_->PutFile(key, path, sha256, keep_going);
  }
  absl::StatusOr<std::vector<Listed>> List(const std::string& folder,
                                           const KeepGoing& keep_going) const override {
    absl::Status status = on_read_ ? on_read_(folder, 0, keep_going) : absl::OkStatus();
    if (!status.ok()) return status;
    return store_->List(folder, keep_going);
  }
  absl::StatusOr<Listed> Find(const std::string& key, const KeepGoing& keep_going) const override {
    return store_->Find(key, keep_going);
  }
  absl::Status Delete(const std::string& key) override { return store_->Delete(key); }
  void Stop() override { store_->Stop(); }

 private:
  const std::unique_ptr<objects::ObjectStore> store_;
  const OnRead& on_read_;
};

}  // namespace walsh::service
