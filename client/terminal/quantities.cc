#include "client/terminal/quantities.h"

#include <array>
#include <cmath>

#include "absl/strings/str_cat.h"
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
  const std::string digits = std::to_string(count);
  const size_t sign = count < 0 ? 1 : 0;
  std::string text;
  for (size_t i = 0; i < digits.size(); ++i) {
    if (i > sign && (digits.size() - i) % 3 == 0) text += ',';
    text += digits[i];
  }
  return text;
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
  // Rounding may carry into another digit: 0.9996 has the magnitude of 1.00.
  const double unit = std::pow(10.0, std::floor(std::log10(std::fabs(value))) - (n - 1));
  const double rounded = std::round(value / unit) * unit;
  const int magnitude = static_cast<int>(std::floor(std::log10(std::fabs(rounded) * (1 + 1e-12))));
  if (magnitude < -4 || magnitude > 8) return absl::StrFormat("%.*e", n - 1, value);
  return absl::StrFormat("%.*f", std::max(0, n - 1 - magnitude), value);
}

std::string ErrorText(double error) {
  return error > 0 ? absl::StrCat(" ± ", SignificantText(error, 2)) : "";
}

std::string EstimateText(double value, double error, int n) {
  return SignificantText(value, n) + ErrorText(error);
}

std::string TimeText(const google::protobuf::Timestamp& time) {
  if (time.seconds() == 0) return "-";
  return absl::FormatTime("%Y-%m-%d %H:%M:%S", absl::FromUnixSeconds(time.seconds()),
                          absl::LocalTimeZone());
}

}  // namespace walsh::client
