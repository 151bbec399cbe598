#include "worker/pipeline/object_checkpoint_store.h"

#include <algorithm>
#include <limits>
#include <map>
#include <set>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/limits.h"
#include "common/sha256.h"
#include "common/status_macros.h"
#include "worker/pipeline/stored_generation.h"

namespace walsh::pipeline {
namespace {

using objects::ObjectStore;

constexpr char kFolder[] = "checkpoints";
constexpr char kCurrent[] = "/CURRENT";
constexpr int64_t kCurrentBytesMax = 64 << 10;

class ObjectCheckpointStore final : public CheckpointStore {
 public:
  ObjectCheckpointStore(ObjectStore* store, std::string folder, int64_t fencing_token)
      : store_(*store), folder_(std::move(folder)), fencing_token_(fencing_token) {}

  absl::StatusOr<Found> Claim() override {
    WALSH_ASSIGN_OR_RETURN(const Current current, ReadCurrent());
    WALSH_RETURN_IF_ERROR(CheckToken(current.fencing_token, fencing_token_));
    Found found;
    found.n_damaged = current.is_damaged ? 1 : 0;
    std::vector<Committed> committed;
    for (const Object& object : current.generations) {
      absl::StatusOr<StoredGeneration> stored = ReadGeneration(object);
      if (absl::IsDataLoss(stored.status())) {
        ++found.n_damaged;
        continue;
      }
      WALSH_RETURN_IF_ERROR(stored.status());
      found.generations.push_back(stored->generation);
      committed.push_back({object, std::move(stored->generation.objects)});
    }
    version_ = current.version;
    committed_ = std::move(committed);
    WALSH_RETURN_IF_ERROR(WriteCurrent());
    is_claimed_ = true;
    return found;
  }

  absl::StatusOr<Object> Put(std::string_view contents) override {
    Object object{Sha256Hex(contents), static_cast<int64_t>(contents.size())};
    // Also where it is there already: it may be damaged.
    WALSH_RETURN_IF_ERROR(store_.Put(Key(object), contents).status());
    return object;
  }

  absl::Status Get(const Object& object, std::span<std::byte> into) const override {
    if (static_cast<int64_t>(into.size()) != object.size_bytes) return DamagedObject(object);
    return Read(object, [&](int64_t offset, int64_t n_bytes) {
      return into.subspan(static_cast<size_t>(offset), static_cast<size_t>(n_bytes));
    });
  }

  absl::Status Check(const Object& object) const override {
    std::vector<std::byte> piece(
        static_cast<size_t>(std::clamp(object.size_bytes, int64_t{0}, objects::kPieceBytes)));
    return Read(object, [&](int64_t, int64_t n_bytes) {
      return std::span(piece).first(static_cast<size_t>(n_bytes));
    });
  }

  absl::Status Commit(const Generation& generation) override {
    WALSH_ASSIGN_OR_RETURN(const std::vector<ObjectStore::Listed> before, List());
    WALSH_ASSIGN_OR_RETURN(Object object, Put(ToText({fencing_token_, generation})));
    std::vector<Committed> next = {{std::move(object), generation.objects}};
    if (!committed_.empty()) next.push_back(committed_.front());
    std::swap(committed_, next);
    if (const absl::Status written = WriteCurrent(); !written.ok()) {
      std::swap(committed_, next);
      return written;
    }
    return RemoveUnneeded(before);
  }

  absl::Status Discard() override {
    // What was not claimed is not known, and nothing was put.
    if (!is_claimed_) return absl::OkStatus();
    WALSH_ASSIGN_OR_RETURN(const std::vector<ObjectStore::Listed> before, List());
    WALSH_RETURN_IF_ERROR(WriteCurrent());  // nobody else has claimed it
    return RemoveUnneeded(before);
  }

  // An endpoint does not tell.
  absl::StatusOr<int64_t> FreeBytes() const override { return std::numeric_limits<int64_t>::max(); }

 private:
  // A generation, as an object of its own, and the objects that it needs.
  struct Committed {
    Object object;
    std::vector<Object> needs;
  };
  struct Current {
    std::string version;  // empty: there is none
    int64_t fencing_token = 0;
    std::vector<Object> generations;
    bool is_damaged = false;
  };

  std::string ObjectsFolder() const { return folder_ + "/objects"; }
  std::string Key(const Object& object) const {
    return absl::StrCat(ObjectsFolder(), "/", object.sha256);
  }

  absl::StatusOr<std::vector<ObjectStore::Listed>> List() const {
    return store_.List(ObjectsFolder());
  }

  absl::StatusOr<Current> ReadCurrent() const {
    const absl::StatusOr<ObjectStore::Contents> text =
        store_.Get(folder_ + kCurrent, kCurrentBytesMax);
    if (absl::IsNotFound(text.status())) return Current();
    WALSH_RETURN_IF_ERROR(text.status());
    Current current{.version = text->version};
    absl::StatusOr<StoredGeneration> stored = FromText(text->bytes);
    if (!stored.ok()) {
      current.is_damaged = true;
      return current;
    }
    current.fencing_token = stored->fencing_token;
    current.generations = std::move(stored->generation.objects);
    return current;
  }

  absl::StatusOr<StoredGeneration> ReadGeneration(const Object& object) const {
    if (object.size_bytes < 0 || object.size_bytes > limits::kJsonFileBytesMax) {
      return DamagedObject(object);
    }
    std::string text(static_cast<size_t>(object.size_bytes), '\0');
    WALSH_RETURN_IF_ERROR(Get(object, std::as_writable_bytes(std::span(text))));
    return FromText(text);
  }

  // Replaces CURRENT by this holder's token and `committed_`.
  absl::Status WriteCurrent() {
    StoredGeneration current{fencing_token_, {}};
    for (const Committed& committed : committed_) {
      current.generation.objects.push_back(committed.object);
    }
    const std::string text = ToText(current);
    absl::StatusOr<std::string> written =
        store_.Put(folder_ + kCurrent, text,
                   {.must_be_absent = version_.empty(), .must_be_version = version_});
    if (absl::IsAborted(written.status())) {
      WALSH_ASSIGN_OR_RETURN(written, VersionAfterConflict(text));
    }
    // Not made again where it is gone: that is a checkpoint of a job that has ended.
    WALSH_RETURN_IF_ERROR(written.status());
    version_ = *std::move(written);
    return absl::OkStatus();
  }

  // A write that took place, and whose answer was lost, conflicts with itself.
  absl::StatusOr<std::string> VersionAfterConflict(const std::string& text) const {
    WALSH_ASSIGN_OR_RETURN(const ObjectStore::Contents there,
                           store_.Get(folder_ + kCurrent, kCurrentBytesMax));
    if (there.bytes == text) return there.version;
    WALSH_ASSIGN_OR_RETURN(const StoredGeneration other, FromText(there.bytes));
    WALSH_RETURN_IF_ERROR(CheckToken(other.fencing_token, fencing_token_));
    return absl::UnavailableError("another writer has changed the checkpoint");
  }

  absl::Status RemoveUnneeded(const std::vector<ObjectStore::Listed>& before) {
    std::set<std::string> needed;
    for (const Committed& committed : committed_) {
      needed.insert(Key(committed.object));
      for (const Object& object : committed.needs) needed.insert(Key(object));
    }
    for (const ObjectStore::Listed& object : before) {
      if (!needed.contains(object.key)) WALSH_RETURN_IF_ERROR(store_.Delete(object.key));
    }
    return absl::OkStatus();
  }

  template <typename Place>
  absl::Status Read(const Object& object, const Place& place) const {
    // What a manifest says of an object is as good as its digest.
    if (object.size_bytes < 0 || !objects::CheckKey(object.sha256).ok()) {
      return DamagedObject(object);
    }
    const absl::Status read =
        objects::ReadVerified(store_, Key(object), {object.size_bytes, object.sha256}, place,
                              [](std::span<const std::byte>) { return absl::OkStatus(); });
    const bool is_damaged = absl::IsNotFound(read) || absl::IsDataLoss(read);
    return is_damaged ? DamagedObject(object) : read;
  }

  ObjectStore& store_;
  const std::string folder_;
  const int64_t fencing_token_;
  std::string version_;  // of CURRENT, as this holder has seen it last
  std::vector<Committed> committed_;
  bool is_claimed_ = false;
};

std::string JobFolder(const std::string& job) { return absl::StrCat(kFolder, "/", job); }

absl::Status Remove(ObjectStore& store, std::vector<ObjectStore::Listed> listed) {
  // First what makes it a checkpoint: a holder who wakes finds that it is gone.
  std::stable_partition(listed.begin(), listed.end(), [](const ObjectStore::Listed& object) {
    return absl::EndsWith(object.key, kCurrent);
  });
  for (const ObjectStore::Listed& object : listed) {
    WALSH_RETURN_IF_ERROR(store.Delete(object.key));
  }
  return absl::OkStatus();
}

}  // namespace

std::unique_ptr<CheckpointStore> MakeObjectCheckpointStore(ObjectStore* store,
                                                           const std::string& job,
                                                           const std::string& family,
                                                           int64_t fencing_token) {
  return std::make_unique<ObjectCheckpointStore>(store, absl::StrCat(JobFolder(job), "/", family),
                                                 fencing_token);
}

absl::Status RemoveObjectCheckpoints(ObjectStore& store, const std::string& job) {
  WALSH_ASSIGN_OR_RETURN(std::vector<ObjectStore::Listed> listed, store.List(JobFolder(job)));
  return Remove(store, std::move(listed));
}

absl::Status RemoveStaleObjectCheckpoints(ObjectStore& store, absl::Duration age) {
  WALSH_ASSIGN_OR_RETURN(const std::vector<ObjectStore::Listed> listed, store.List(kFolder));
  std::map<std::string, absl::Time> changed;  // by job
  for (const ObjectStore::Listed& object : listed) {
    const size_t begin = sizeof(kFolder);
    const std::string job = object.key.substr(begin, object.key.find('/', begin) - begin);
    absl::Time& last = changed.try_emplace(job, absl::InfinitePast()).first->second;
    last = std::max(last, object.modified);
  }
  for (const auto& [job, last] : changed) {
    if (absl::Now() - last <= age) continue;
    // A holder may have gone on since the first list.
    WALSH_ASSIGN_OR_RETURN(std::vector<ObjectStore::Listed> now, store.List(JobFolder(job)));
    const bool is_stale = std::all_of(now.begin(), now.end(), [&](const auto& object) {
      return absl::Now() - object.modified > age;
    });
    if (is_stale) WALSH_RETURN_IF_ERROR(Remove(store, std::move(now)));
  }
  return absl::OkStatus();
}

}  // namespace walsh::pipeline
