#include "client/terminal/preset_table.h"

#include <gtest/gtest.h>

namespace walsh::client {
namespace {

TEST(PresetTableTest, TellsTheRecipeInOneLine) {
  v1::ListQuantizationPresetsResponse response;
  v1::QuantizationPreset& online = *response.add_presets();
  online.set_name("quarot-w4a4kv4");
  online.set_reproduces("QuaRot, W4A4KV4");
  online.add_devices("cpu");
  v1::QuantizationConfig& config = *online.mutable_config();
  config.set_bits(4);
  config.set_symmetric(true);
  config.set_group_size(-1);
  config.set_method(v1::QuantizationConfig::GPTQ);
  config.mutable_rotation()->set_kind(v1::Rotation::LOCAL_HADAMARD);
  config.mutable_rotation()->set_signs(v1::Rotation::SEEDED);
  config.mutable_rotation()->set_online_kind(v1::Rotation::HADAMARD);
  config.mutable_activation_quantization()->set_bits(4);
  config.mutable_kv_cache_quantization()->set_bits(2);
  v1::QuantizationPreset& portable = *response.add_presets();
  portable.set_name("gsr-w2-portable");
  portable.set_portable(true);
  portable.add_devices("cpu");
  portable.add_devices("cuda");
  portable.mutable_config()->set_bits(2);
  portable.mutable_config()->set_method(v1::QuantizationConfig::GPTQ);
  portable.mutable_config()->set_error_propagation(0.5);
  portable.mutable_config()->mutable_rotation()->set_kind(v1::Rotation::GSR);
  portable.mutable_config()->mutable_rotation()->set_online_kind(v1::Rotation::NONE);
  EXPECT_EQ(PresetTable(response),
            "PRESET               WEIGHTS    GROUP  ACTIVATIONS  KV  "
            "ROTATION                                    METHOD                PORTABLE  DEVICES   "
            "REPRODUCES\n"
            "quarot-w4a4kv4   4 symmetric  channel            4   2  "
            "local-hadamard with signs, online hadamard  gptq                  no        cpu       "
            "QuaRot, W4A4KV4\n"
            "gsr-w2-portable            2     auto           16  16  "
            "gsr                                         gptq, propagated 0.5  yes       cpu,cuda  "
            "-\n");
}

}  // namespace
}  // namespace walsh::client
