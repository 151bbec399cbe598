#include "worker/io/online_transforms.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tests/testing/status_matchers.h"

namespace walsh {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
using ::walsh::testing::StatusIs;

ModelConfig Config() {
  ModelConfig config;
  config.hidden = 64;
  config.intermediate = 192;
  config.n_heads = 4;
  config.n_kv_heads = 2;
  config.head_dim = 16;
  return config;
}

OnlineTransforms Everything() {
  return {.down_input = {.block = 64, .sequency = false},
          .query_key = {.block = 16, .sequency = true},
          .activations = {4, OnlineTransforms::kWholeRow, true, 0.9},
          .kv_cache = {2, 16, false, 0.95}};
}

TEST(OnlineTransformsTest, JsonSaysEverythingAndIsReadBack) {
  const json written = OnlineTransformsJson(Everything());
  EXPECT_EQ(written, json::parse(R"({
      "down_proj_input": {"matrix": "hadamard", "block": 64},
      "query_key": {"matrix": "walsh", "block": 16},
      "activations": {"bits": 4, "group_size": -1, "symmetric": true, "clip_ratio": 0.9},
      "kv_cache": {"bits": 2, "group_size": 16, "symmetric": false, "clip_ratio": 0.95}})"));
  const json config = {{"online_transforms", written}};
  ASSERT_OK_AND_ASSIGN(const OnlineTransforms read, ParseOnlineTransforms(config, Config()));
  EXPECT_EQ(read, Everything());
}

TEST(OnlineTransformsTest, NothingIsAnEmptyObject) {
  EXPECT_EQ(OnlineTransformsJson({}), json::object());
  for (const char* text :
       {"{}", R"({"online_transforms": null})", R"({"online_transforms": {}})"}) {
    ASSERT_OK_AND_ASSIGN(const OnlineTransforms read,
                         ParseOnlineTransforms(json::parse(text), Config()));
    EXPECT_TRUE(read.empty());
  }
}

TEST(OnlineTransformsTest, RotationsAreWhatKeepsTheFunction) {
  OnlineTransforms rotations = Everything();
  rotations.activations = {};
  rotations.kv_cache = {};
  EXPECT_EQ(Everything().rotations(), rotations);
  EXPECT_FALSE(rotations.empty());
}

TEST(OnlineTransformsTest, HostileMembersAreRefused) {
  struct Case {
    const char* text;
    absl::StatusCode code;
    const char* message;
  };
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;
  for (const Case& c : {
           Case{R"([])", kInvalid, "no object"},
           Case{R"("R4")", kInvalid, "no object"},
           Case{R"({"smoothing": {}})", kUnimplemented, "'smoothing' is not known"},
           Case{R"({"query_key": 16})", kInvalid, "no object"},
           Case{R"({"query_key": {"matrix": "walsh"}})", kInvalid, "'block' is missing"},
           Case{R"({"query_key": {"matrix": "walsh", "block": 16, "signs": 1}})", kUnimplemented,
                "'signs' is not known"},
           Case{R"({"query_key": {"matrix": "dct", "block": 16}})", kUnimplemented, "dct"},
           Case{R"({"query_key": {"matrix": "walsh", "block": 32}})", kInvalid, "does not divide"},
           Case{R"({"query_key": {"matrix": "walsh", "block": 0}})", kInvalid, "positive"},
           Case{R"({"down_proj_input": {"matrix": "walsh", "block": -64}})", kInvalid, "positive"},
           Case{R"({"down_proj_input": {"matrix": "walsh", "block": "64"}})", kInvalid, "positive"},
           Case{R"({"down_proj_input": {"matrix": "walsh", "block": 100}})", kInvalid, "192"},
           Case{R"({"kv_cache": {"bits": 4294967300, "group_size": 16, "symmetric": false,
                    "clip_ratio": 1}})",
                kInvalid, "4294967300 bits"},
           Case{R"({"kv_cache": {"bits": 3, "group_size": 16, "symmetric": false,
                    "clip_ratio": 1}})",
                kInvalid, "2, 4 or 8"},
           Case{R"({"kv_cache": {"bits": 4, "group_size": 0, "symmetric": false,
                    "clip_ratio": 1}})",
                kInvalid, "group of 0"},
           Case{R"({"activations": {"bits": 4, "group_size": 48, "symmetric": true,
                    "clip_ratio": 1}})",
                kInvalid, "group of 48"},
           Case{R"({"activations": {"bits": 4, "group_size": -1, "symmetric": true,
                    "clip_ratio": 0}})",
                kInvalid, "clip ratio 0"},
           // Too little to leave any value, and to be a step above 0.
           Case{R"({"activations": {"bits": 4, "group_size": -1, "symmetric": true,
                    "clip_ratio": 0.0099}})",
                kInvalid, "clip ratio 0.0099, must be from 0.01 to 1"},
           Case{R"({"kv_cache": {"bits": 4, "group_size": 16, "symmetric": false,
                    "clip_ratio": 1e-46}})",
                kInvalid, "clip ratio 1e-46"},
           // 2^64 - 1, which would wrap to the -1 of a whole row.
           Case{R"({"activations": {"bits": 4, "group_size": 18446744073709551615,
                    "symmetric": true, "clip_ratio": 1}})",
                kInvalid, "wrong type"},
           Case{R"({"query_key": {"matrix": "walsh", "block": 18446744073709551600}})", kInvalid,
                "'block' is no positive integer"},
           Case{R"({"activations": {"bits": 4.5, "group_size": -1, "symmetric": true,
                    "clip_ratio": 1}})",
                kInvalid, "wrong type"},
       }) {
    const json config = {{"online_transforms", json::parse(c.text)}};
    EXPECT_THAT(ParseOnlineTransforms(config, Config()), StatusIs(c.code, HasSubstr(c.message)))
        << c.text;
  }
}

}  // namespace
}  // namespace walsh
