// Names of resources: "models/{id}", "aliases/{id}", "quantizationJobs/{id}", "workers/{id}".
//
// Where a request names a model, an alias or a job, the bare id is taken as well as the full name.
//
// Errors: INVALID_ARGUMENT with the field, the rule and the value.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace walsh {

inline constexpr std::string_view kModelCollection = "models/";
inline constexpr std::string_view kAliasCollection = "aliases/";
inline constexpr std::string_view kJobCollection = "quantizationJobs/";
inline constexpr std::string_view kWorkerCollection = "workers/";

// [a-z0-9][a-z0-9._-]{0,63} without "..", so that an id is a safe directory name. Also of
// aliases, which stand where a model's id does.
bool IsModelId(std::string_view id);
// [a-z][a-z0-9-]{0,62}
bool IsJobId(std::string_view id);

std::string ModelName(std::string_view id);
std::string AliasName(std::string_view id);
std::string JobName(std::string_view id);
std::string WorkerName(std::string_view id);

// The id in `name`, which is full or bare. `field` is the request's field, for the error.
absl::StatusOr<std::string> ParseModelName(std::string_view field, std::string_view name);
absl::StatusOr<std::string> ParseAliasName(std::string_view field, std::string_view name);
absl::StatusOr<std::string> ParseJobName(std::string_view field, std::string_view name);

}  // namespace walsh
