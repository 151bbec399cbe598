#include "worker/service/model_sources.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/publish.h"
#include "common/status_macros.h"
#include "worker/objects/s3_options.h"

namespace walsh::service {
namespace {

constexpr char kFlag[] = "--model-url-prefix";
constexpr char kParts[] = "whose parts are letters, digits, '-', '_' and '.'";

bool IsBeneath(const objects::S3Location& prefix, const objects::S3Location& place) {
  if (prefix.bucket != place.bucket) return false;
  return prefix.key.empty() || place.key == prefix.key || place.key.starts_with(prefix.key + "/");
}

}  // namespace

absl::StatusOr<std::unique_ptr<ModelSources>> ModelSources::Open(Options options) {
  if (!options.open_bucket) {
    options.open_bucket = [](const std::string& bucket) {
      return objects::OpenObjectStore(kFlag, absl::StrCat("s3://", bucket));
    };
  }
  std::unique_ptr<ModelSources> sources(new ModelSources);
  for (const std::string& prefix : options.prefixes) {
    objects::S3Location place = objects::SplitS3Location(prefix);
    if (!objects::IsS3Location(prefix) ||
        (!place.key.empty() && !objects::CheckKey(place.key).ok())) {
      return absl::InvalidArgumentError(
          absl::StrCat(kFlag, " '", prefix, "' must be s3://BUCKET[/KEY] ", kParts));
    }
    if (auto& bucket = sources->buckets_[place.bucket]; bucket == nullptr) {
      WALSH_ASSIGN_OR_RETURN(bucket, options.open_bucket(place.bucket));
    }
    sources->prefixes_.push_back(std::move(place));
  }
  WALSH_ASSIGN_OR_RETURN(sources->cache_, SourceCache::Open(std::move(options.cache_directory),
                                                            options.cache_bytes_max));
  return sources;
}

absl::StatusOr<RemoteSource> ModelSources::Find(std::string_view reference,
                                                const KeepGoing& keep_going) const {
  const objects::S3Location place = objects::SplitS3Location(reference);
  if (!objects::CheckKey(place.key).ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", std::string(reference), "' is no s3://BUCKET/KEY ", kParts));
  }
  const bool is_allowed =
      std::any_of(prefixes_.begin(), prefixes_.end(),
                  [&](const objects::S3Location& prefix) { return IsBeneath(prefix, place); });
  if (!is_allowed) {
    return absl::InvalidArgumentError(absl::StrCat("'", std::string(reference),
                                                   "' lies beneath no URL that this worker may "
                                                   "read (",
                                                   kFlag, ")"));
  }
  return FindRemoteSource(*buckets_.at(place.bucket), place.key,
                          absl::StrCat("s3://", place.bucket, "/", place.key), keep_going);
}

void ModelSources::Stop() {
  for (const auto& [name, bucket] : buckets_) bucket->Stop();
}

References::References(ModelSources* sources, PathResolver paths, FetchExtent extent,
                       CopyProgress progress)
    : sources_(sources),
      paths_(std::move(paths)),
      extent_(extent),
      progress_(std::move(progress)) {}

References::~References() {
  // What stays is removed at the next start.
  for (const std::string& directory : temporaries_) RemoveTree(directory).IgnoreError();
}

bool References::IsPath(std::string_view reference) const {
  return sources_ == nullptr || !objects::IsS3Location(reference);
}

absl::StatusOr<RemoteSource> References::Find(std::string_view reference) const {
  return sources_->Find(reference, [this] { return KeepGoingNow(); });
}

absl::StatusOr<std::string> References::ResolveModel(std::string_view reference) {
  if (IsPath(reference)) return paths_(reference);
  WALSH_ASSIGN_OR_RETURN(const RemoteSource source, Find(reference));
  if (!source.is_model()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "'", source.reference, "' is no model, which is a folder or an object NAME.gguf"));
  }
  return extent_ == FetchExtent::kWhole ? FetchWhole(source) : FetchHeaders(source);
}

absl::StatusOr<std::string> References::ResolveText(std::string_view reference) {
  if (IsPath(reference)) return paths_(reference);
  WALSH_ASSIGN_OR_RETURN(const RemoteSource source, Find(reference));
  if (source.is_model()) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", source.reference, "' is a model, not a text"));
  }
  return FetchWhole(source);
}

absl::StatusOr<std::string> References::FetchWhole(const RemoteSource& source) {
  WALSH_ASSIGN_OR_RETURN(
      SourceCache::Pin pin,
      sources_->cache().Get(
          source.Fingerprint(), source.size_bytes(),
          [&](const std::string& directory) { return CopySource(source, directory, progress_); },
          [this] { return KeepGoingNow(); }));
  return source.PathIn(pins_.emplace_back(std::move(pin)).directory());
}

absl::StatusOr<std::string> References::FetchHeaders(const RemoteSource& source) {
  SourceCache& cache = sources_->cache();
  WALSH_RETURN_IF_ERROR(cache.CheckFits(source.size_bytes()));
  if (absl::StatusOr<SourceCache::Pin> pin = cache.Find(source.Fingerprint()); pin.ok()) {
    return source.PathIn(pins_.emplace_back(*std::move(pin)).directory());
  }
  WALSH_ASSIGN_OR_RETURN(const std::string directory, cache.MakeTemporaryDirectory());
  temporaries_.push_back(directory);
  WALSH_RETURN_IF_ERROR(CopyHeaders(source, directory, progress_));
  return source.PathIn(directory);
}

}  // namespace walsh::service
