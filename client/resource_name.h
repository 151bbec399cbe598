// Names of jobs, models and aliases as people type them and as the service spells them.
//
// People type "demo" or paste "models/demo"; both mean the same. Whether an id is valid is the
// service's to say.
#pragma once

#include <string>
#include <string_view>

namespace walsh::client {

std::string FullJobName(std::string_view id);    // "quantizationJobs/{id}"
std::string FullModelName(std::string_view id);  // "models/{id}"
std::string FullAliasName(std::string_view id);  // "aliases/{id}"
// The part after the last "/", which is what people type and tables show.
std::string ResourceId(std::string_view name);

}  // namespace walsh::client
