#include "client/terminal/error_text.h"

#include <gtest/gtest.h>

#include "common/grpc_status.h"

namespace walsh::client {
namespace {

TEST(ErrorTextTest, IsOneLineWhenThereIsNoMore) {
  EXPECT_EQ(ErrorText(absl::NotFoundError("model 'x' does not exist")),
            "error: NOT_FOUND: model 'x' does not exist\n");
}

TEST(ErrorTextTest, DoesNotRepeatTheViolationThatTheMessageNames) {
  EXPECT_EQ(ErrorText(InvalidField("config.bits", "5 is not one of 2, 3, 4, 8")),
            "error: INVALID_ARGUMENT: config.bits: 5 is not one of 2, 3, 4, 8\n");
}

TEST(ErrorTextTest, ListsViolationsThatTheMessageDoesNotName) {
  absl::Status status = InvalidField("config.bits", "no");
  absl::Status other(absl::StatusCode::kInvalidArgument, "a field is wrong");
  status.ForEachPayload(
      [&](absl::string_view url, const absl::Cord& payload) { other.SetPayload(url, payload); });
  EXPECT_EQ(ErrorText(other), "error: INVALID_ARGUMENT: a field is wrong\n  config.bits: no\n");
}

TEST(ErrorTextTest, ShowsReasonMetadataAndRetryDelay) {
  absl::Status status = absl::UnavailableError("loading");
  SetErrorInfo(status, "MODEL_LOADING", {{"model", "m"}});
  SetRetryDelay(status, absl::Milliseconds(1500));
  const std::string text = ErrorText(status);
  EXPECT_NE(text.find("error: UNAVAILABLE: loading\n"), std::string::npos) << text;
  EXPECT_NE(text.find("  reason: MODEL_LOADING, model: m\n"), std::string::npos) << text;
  EXPECT_NE(text.find("  try again in 1.5s\n"), std::string::npos) << text;
}

TEST(ErrorTextTest, CannotMoveTheTerminal) {
  EXPECT_EQ(ErrorText(absl::InternalError("\x1b]0;x\x07")), "error: INTERNAL: \uFFFD]0;x\uFFFD\n");
}

}  // namespace
}  // namespace walsh::client
