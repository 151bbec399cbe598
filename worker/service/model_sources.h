// Models and texts in buckets that a request may name, and where copies of them lie.
//
// A reference s3://BUCKET/KEY is read where it is one of the configured URL prefixes or lies
// beneath one, compared by whole parts between slashes. Nothing in it is escaped or leads upwards:
// its parts are letters, digits, '-', '_' and '.', and begin with none of the last.
//
// Copies lie in a cache by reference, names, sizes and ETags, so that an object that was replaced
// is fetched anew. Whose contents a copy is tells the fingerprint that a job takes of its source,
// wherever that lies.
//
// Errors:  INVALID_ARGUMENT  no such URL, or beneath no prefix; those of RemoteSource, SourceCache
// Threads: safe, but a References is of one thread.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/objects/object_store.h"
#include "worker/objects/s3_options.h"
#include "worker/service/job_conversion.h"
#include "worker/service/remote_source.h"
#include "worker/service/source_cache.h"

namespace walsh::service {

class ModelSources {
 public:
  // Gives the store whose keys are those of the bucket.
  using OpenBucket = std::function<absl::StatusOr<std::unique_ptr<objects::ObjectStore>>(
      const std::string& bucket)>;
  struct Options {
    std::vector<std::string> prefixes;  // s3://BUCKET[/KEY]
    std::string cache_directory;
    int64_t cache_bytes_max = 0;
    OpenBucket open_bucket;  // empty: as the environment says (worker/objects/s3_options.h)
  };
  static absl::StatusOr<std::unique_ptr<ModelSources>> Open(Options options);

  absl::StatusOr<RemoteSource> Find(std::string_view reference, const KeepGoing& keep_going) const;
  SourceCache& cache() { return *cache_; }
  // What runs ends soon.
  void Stop();

 private:
  ModelSources() = default;

  std::vector<objects::S3Location> prefixes_;
  std::map<std::string, std::unique_ptr<objects::ObjectStore>> buckets_;  // by name
  std::unique_ptr<SourceCache> cache_;
};

// How much of a model in a bucket is fetched.
enum class FetchExtent {
  kWhole,
  kHeaders,  // as CopyHeaders, where the cache does not have all of it
};

// The paths that the references of one request stand for, for as long as this lives.
class References {
 public:
  // `sources` outlives this; null: every reference is a path, which `paths` resolves.
  References(ModelSources* sources, PathResolver paths, FetchExtent extent, CopyProgress progress);
  ~References();
  References(const References&) = delete;
  References& operator=(const References&) = delete;

  // INVALID_ARGUMENT, before anything is fetched, for what is neither a folder nor a GGUF file.
  absl::StatusOr<std::string> ResolveModel(std::string_view reference);
  // INVALID_ARGUMENT for what is.
  absl::StatusOr<std::string> ResolveText(std::string_view reference);
  // For as long as this lives.
  PathResolvers resolvers() {
    return {.model = [this](std::string_view reference) { return ResolveModel(reference); },
            .text = [this](std::string_view reference) { return ResolveText(reference); }};
  }
  // Whether anything was not a path.
  bool has_fetched() const { return !pins_.empty() || !temporaries_.empty(); }

 private:
  bool IsPath(std::string_view reference) const;
  absl::StatusOr<RemoteSource> Find(std::string_view reference) const;
  absl::StatusOr<std::string> FetchWhole(const RemoteSource& source);
  absl::StatusOr<std::string> FetchHeaders(const RemoteSource& source);
  absl::Status KeepGoingNow() const { return progress_ ? progress_(0, 0) : absl::OkStatus(); }

  ModelSources* const sources_;
  const PathResolver paths_;
  const FetchExtent extent_;
  const CopyProgress progress_;
  std::vector<SourceCache::Pin> pins_;
  std::vector<std::string> temporaries_;
};

}  // namespace walsh::service
