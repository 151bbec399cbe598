#include "client/terminal/quantities.h"

#include <array>
#include <cmath>

#include "absl/strings/str_format.h"

namespace walsh::client {

std::string BytesText(int64_t n_bytes) {
  static constexpr std::array<const char*, 5> kUnits = {"kB", "MB", "GB", "TB", "PB"};
  if (n_bytes < 1000) return absl::StrFormat("%d B", n_bytes);
  double value = static_cast<double>(n_bytes) / 1000.0;
  size_t unit = 0;
  // 999.5 would be printed as 1000.
  while (value >= 999.5 && unit + 1 < kUnits.size()) {
    value /= 1000.0;
    ++unit;
  }
  return SignificantText(value, 3) + " " + kUnits[unit];
}

std::string CountText(int64_t count) {
  std::string digits = std::to_string(count);
  const int sign = count < 0 ? 1 : 0;
  for (int i = static_cast<int>(digits.size()) - 3; i > sign; i -= 3) {
    digits.insert(static_cast<size_t>(i), ",");
  }
  return digits;
}

std::string ClockText(absl::Duration duration) {
  const int64_t seconds = absl::ToInt64Seconds(duration + absl::Milliseconds(500));
  if (seconds >= 3600) {
    return absl::StrFormat("%d:%02d:%02d", seconds / 3600, seconds / 60 % 60, seconds % 60);
  }
  return absl::StrFormat("%d:%02d", seconds / 60, seconds % 60);
}

std::string SecondsText(double seconds) {
  if (seconds < 0.0095) return absl::StrFormat("%.4f s", seconds);
  if (seconds < 9.95) return absl::StrFormat("%.2f s", seconds);
  if (seconds < 99.5) return absl::StrFormat("%.1f s", seconds);
  return absl::StrFormat("%.0f s", seconds);
}

std::string SignificantText(double value, int n) {
  if (value == 0.0 || !std::isfinite(value)) return absl::StrFormat("%g", value);
  const int magnitude = static_cast<int>(std::floor(std::log10(std::fabs(value))));
  if (magnitude < -4 || magnitude > 8) return absl::StrFormat("%.*e", n - 1, value);
  return absl::StrFormat("%.*f", std::max(0, n - 1 - magnitude), value);
}

std::string TimeText(const google::protobuf::Timestamp& time) {
  if (time.seconds() == 0) return "-";
  return absl::FormatTime("%Y-%m-%d %H:%M:%S", absl::FromUnixSeconds(time.seconds()),
                          absl::LocalTimeZone());
}

}  // namespace walsh::client
