#include "client/terminal/json_text.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "common/grpc_status.h"
#include "walsh/v1/model.pb.h"

namespace walsh::client {
namespace {

TEST(JsonTextTest, KeepsProtoNamesAndDefaults) {
  v1::Model model;
  model.set_name("models/a");
  model.set_size_bytes(98'362'432);
  model.set_state(v1::Model::READY);
  const auto json = nlohmann::json::parse(JsonText(model));
  EXPECT_EQ(json["name"], "models/a");
  EXPECT_EQ(json["size_bytes"], "98362432");
  EXPECT_EQ(json["state"], "READY");
  EXPECT_EQ(json["max_model_len"], 0);
}

TEST(JsonTextTest, PrintsErrorDetails) {
  v1::Model model;
  *model.mutable_error() = ToProtoStatus(InvalidField("bits", "no"));
  const auto json = nlohmann::json::parse(JsonText(model));
  EXPECT_EQ(json["error"]["details"][0]["field_violations"][0]["field"], "bits");
}

TEST(JsonTextTest, ALineIsOneLine) {
  v1::Model model;
  model.set_name("a\nb");
  const std::string line = JsonLine(model);
  EXPECT_EQ(line.find('\n'), line.size() - 1);
}

}  // namespace
}  // namespace walsh::client
