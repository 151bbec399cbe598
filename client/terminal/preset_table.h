// The service's presets for people.
#pragma once

#include <string>

#include "walsh/v1/quantization.pb.h"

namespace walsh::client {

// A line for each; --output json has the whole configs.
std::string PresetTable(const v1::ListQuantizationPresetsResponse& response);

}  // namespace walsh::client
