// walsh_workers{state} and walsh_models{state}.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "walsh/v1/model.pb.h"

namespace walsh::fleet {

void SetFleetMetrics(const std::vector<v1::Worker>& workers,
                     const std::map<std::string, v1::Model::State>& models);

}  // namespace walsh::fleet
