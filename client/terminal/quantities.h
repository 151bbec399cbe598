// Sizes, times and counts as people read them.
#pragma once

#include <cstdint>
#include <string>

#include "absl/time/time.h"
#include "google/protobuf/timestamp.pb.h"

namespace walsh::client {

std::string BytesText(int64_t n_bytes);            // "512 B", "98.4 MB", "1.25 GB"; powers of ten
std::string CountText(int64_t count);              // "12,345"
std::string ClockText(absl::Duration duration);    // "0:07", "12:34", "1:02:03"
std::string SecondsText(double seconds);           // "0.12 s", "12.3 s", "123 s"
std::string SignificantText(double value, int n);  // "%.{n}g", without an exponent where readable
std::string ErrorText(double error);               // " ± 0.45"; empty where there is none
// "26.123 ± 0.45"
std::string EstimateText(double value, double error, int n);
// "2025-11-22 10:05:03" in local time, or "-" when unset.
std::string TimeText(const google::protobuf::Timestamp& time);

}  // namespace walsh::client
