// A job as one HTML page that needs nothing else: facts, plots as inline SVG, every linear's error.
//
// No scripts and no outside resources (a Content-Security-Policy says so), so that it works offline
// and can be mailed; all text is escaped, since names and messages travel from other people. The
// same job gives the same bytes.
#pragma once

#include <string>
#include <string_view>

#include "walsh/v1/quantization.pb.h"

namespace walsh::client {

std::string HtmlReport(const v1::QuantizationJob& job);

// `text` between tags or in a quoted attribute; control characters become U+FFFD.
std::string HtmlText(std::string_view text);

}  // namespace walsh::client
