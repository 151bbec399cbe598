#include <cmath>
#include <numbers>

#include "worker/model/decoder_layer.h"

namespace walsh {
namespace {

// Llama 3.1: wavelengths far below the original context stay, those far above are stretched by
// `factor`, and between the two the frequency is interpolated.
double Llama3Frequency(double frequency, const RopeScaling& scaling) {
  const double wavelength = 2.0 * std::numbers::pi / frequency;
  const auto context = static_cast<double>(scaling.original_max_position);
  if (wavelength < context / scaling.high_freq_factor) return frequency;
  if (wavelength > context / scaling.low_freq_factor) return frequency / scaling.factor;
  const double smooth = (context / wavelength - scaling.low_freq_factor) /
                        (scaling.high_freq_factor - scaling.low_freq_factor);
  return (1.0 - smooth) * frequency / scaling.factor + smooth * frequency;
}

}  // namespace

std::vector<float> RopeInverseFrequencies(const ModelConfig& config) {
  const RopeScaling& scaling = config.rope_scaling;
  std::vector<float> frequencies(static_cast<size_t>(config.head_dim / 2));
  for (size_t i = 0; i < frequencies.size(); ++i) {
    double frequency = std::pow(
        config.rope_theta, -2.0 * static_cast<double>(i) / static_cast<double>(config.head_dim));
    if (!scaling.frequency_divisors.empty()) {
      frequency /= static_cast<double>(scaling.frequency_divisors[i]);
    } else if (scaling.kind == RopeScaling::Kind::kLinear) {
      frequency /= scaling.factor;
    } else if (scaling.kind == RopeScaling::Kind::kLlama3) {
      frequency = Llama3Frequency(frequency, scaling);
    }
    frequencies[i] = static_cast<float>(frequency);
  }
  return frequencies;
}

std::vector<float> SlidingRopeInverseFrequencies(const ModelConfig& config) {
  if (config.sliding_rope_theta == 0) return RopeInverseFrequencies(config);
  ModelConfig sliding;
  sliding.head_dim = config.head_dim;
  sliding.rope_theta = config.sliding_rope_theta;
  return RopeInverseFrequencies(sliding);
}

}  // namespace walsh
