// Models to and from the formats of other programs: ExportModel and ImportModel on a worker.
//
// Exports lie in folders beneath one root (--export-root, by default <data-dir>/exports). A folder
// appears by one rename, whole; the worker never reads it again, and whoever wants it gone removes
// it. An import becomes a model of the store like any other.
//
// Errors:  those of worker/interop; NOT_FOUND an unknown model; INVALID_ARGUMENT an output outside
//          the root; ALREADY_EXISTS something has the name; RESOURCE_EXHAUSTED another conversion
//          is running (CONVERSION_RUNNING, with RetryInfo) or the disk is short
//          (INSUFFICIENT_DISK); CANCELLED
// Threads: safe; calls block.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "walsh/v1/model.pb.h"
#include "worker/service/job_conversion.h"
#include "worker/service/model_sources.h"
#include "worker/service/model_store.h"

namespace walsh::service {

// Called after each tensor. A status that is not OK ends the conversion and becomes its result.
using ConversionProgress = std::function<absl::Status(int64_t tensors_done, int64_t tensors_total)>;

class ModelConversions {
 public:
  struct Options {
    std::string export_root;
    std::string worker_id;
    PathResolver resolve;             // of sources
    ModelSources* sources = nullptr;  // null: they are paths. Outlives this
    int n_threads = 1;                // that take digests
  };
  // Creates the root and removes what a dead process left unfinished in it. `models` outlives this.
  static absl::StatusOr<std::unique_ptr<ModelConversions>> Open(Options options,
                                                                ModelStore* models);

  absl::StatusOr<v1::ModelExport> Export(const v1::ExportModelRequest& request,
                                         const ConversionProgress& progress);
  absl::StatusOr<v1::Model> Import(const v1::ImportModelRequest& request,
                                   const ConversionProgress& progress);

 private:
  ModelConversions(Options options, ModelStore* models)
      : options_(std::move(options)), models_(models) {}
  // The folder that a request names, beneath the root.
  absl::StatusOr<std::string> OutputDirectory(const std::string& output) const;

  const Options options_;
  ModelStore* const models_;
  std::mutex running_;  // held through a conversion
};

}  // namespace walsh::service
