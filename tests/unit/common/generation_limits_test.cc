#include "common/generation_limits.h"

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "common/limits.h"
#include "tests/testing/status_matchers.h"

namespace walsh {
namespace {

using ::testing::HasSubstr;
using ::walsh::testing::HasCode;
using ::walsh::testing::IsOk;
using ::walsh::testing::StatusIs;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
constexpr int kIntMax = std::numeric_limits<int>::max();
constexpr int kIntMin = std::numeric_limits<int>::min();
const double kNaN = std::nan("");
const double kInf = std::numeric_limits<double>::infinity();

v1::GenerateRequest Valid() {
  v1::GenerateRequest request;
  request.set_model("models/tiny-4bit");
  request.set_prompt("Once upon a time");
  return request;
}

using SetInt = std::function<void(v1::SamplingParams&, int)>;
struct IntField {
  std::string name;
  SetInt set;
  int min;
  int max;
};

TEST(GenerationLimitsTest, IntegersAtTheirLimits) {
  const std::vector<IntField> fields = {
      {"max_tokens", [](auto& s, int v) { s.set_max_tokens(v); }, 1, limits::kNewTokensMax},
      {"min_tokens", [](auto& s, int v) { s.set_min_tokens(v); }, 0, limits::kNewTokensDefault},
      {"top_k", [](auto& s, int v) { s.set_top_k(v); }, 0, kIntMax},
      {"top_logprobs",
       [](auto& s, int v) {
         s.set_logprobs(true);
         s.set_top_logprobs(v);
       },
       0, limits::kTopLogprobsMax},
      {"stop_token_ids[0]", [](auto& s, int v) { s.add_stop_token_ids(v); }, 0,
       limits::kVocabMax - 1},
  };
  for (const IntField& field : fields) {
    for (const int value : {field.min, field.max, field.min + 1, field.max - 1}) {
      v1::GenerateRequest request = Valid();
      field.set(*request.mutable_sampling(), value);
      EXPECT_OK(ValidateRequest(request)) << field.name << " = " << value;
    }
    for (const int value : {field.min - 1, -1, kIntMin}) {
      v1::GenerateRequest request = Valid();
      field.set(*request.mutable_sampling(), value);
      EXPECT_THAT(ValidateRequest(request), StatusIs(kInvalid, HasSubstr(field.name)))
          << field.name << " = " << value;
    }
    if (field.max == kIntMax) continue;
    for (const int value : {field.max + 1, kIntMax}) {
      v1::GenerateRequest request = Valid();
      field.set(*request.mutable_sampling(), value);
      EXPECT_THAT(ValidateRequest(request), StatusIs(kInvalid, HasSubstr(std::to_string(value))))
          << field.name << " = " << value;
    }
  }
}

struct RealField {
  std::string name;
  std::function<void(v1::SamplingParams&, double)> set;
  std::vector<double> good;
  std::vector<double> bad;
};

TEST(GenerationLimitsTest, RealsAtTheirLimits) {
  const std::vector<RealField> fields = {
      {"temperature", [](auto& s, double v) { s.set_temperature(v); }, {0, 1, 2}, {-0.001, 2.001}},
      {"top_p", [](auto& s, double v) { s.set_top_p(v); }, {1e-9, 1}, {0, -1, 1.001}},
      {"min_p", [](auto& s, double v) { s.set_min_p(v); }, {0, 0.999}, {-0.001, 1}},
      {"repetition_penalty",
       [](auto& s, double v) { s.set_repetition_penalty(v); },
       {0.001, 1, 10},
       {0, -1, 10.001}},
      {"presence_penalty",
       [](auto& s, double v) { s.set_presence_penalty(v); },
       {-2, 0, 2},
       {-2.001, 2.001}},
      {"frequency_penalty",
       [](auto& s, double v) { s.set_frequency_penalty(v); },
       {-2, 0, 2},
       {-2.001, 2.001}},
  };
  for (const RealField& field : fields) {
    for (const double value : field.good) {
      v1::GenerateRequest request = Valid();
      field.set(*request.mutable_sampling(), value);
      EXPECT_OK(ValidateRequest(request)) << field.name << " = " << value;
    }
    std::vector<double> bad = field.bad;
    bad.insert(bad.end(), {kNaN, -kNaN, kInf, -kInf, 2147483648.0, -2147483648.0, 1e308});
    for (const double value : bad) {
      v1::GenerateRequest request = Valid();
      field.set(*request.mutable_sampling(), value);
      EXPECT_THAT(ValidateRequest(request), StatusIs(kInvalid, HasSubstr(field.name)))
          << field.name << " = " << value;
    }
  }
}

TEST(GenerationLimitsTest, MinTokensMayNotExceedMaxTokens) {
  v1::GenerateRequest request = Valid();
  request.mutable_sampling()->set_max_tokens(5);
  request.mutable_sampling()->set_min_tokens(5);
  EXPECT_OK(ValidateRequest(request));
  request.mutable_sampling()->set_min_tokens(6);
  EXPECT_THAT(ValidateRequest(request), HasCode(kInvalid));
}

TEST(GenerationLimitsTest, TopLogprobsNeedLogprobs) {
  v1::GenerateRequest request = Valid();
  request.mutable_sampling()->set_top_logprobs(1);
  EXPECT_THAT(ValidateRequest(request), StatusIs(kInvalid, HasSubstr("top_logprobs")));
}

TEST(GenerationLimitsTest, StopStrings) {
  const auto check = [](const std::vector<std::string>& stops) {
    v1::GenerateRequest request = Valid();
    for (const std::string& stop : stops) request.mutable_sampling()->add_stop(stop);
    return ValidateRequest(request);
  };
  EXPECT_OK(check(std::vector<std::string>(limits::kStopStringsMax, "x")));
  EXPECT_THAT(check(std::vector<std::string>(limits::kStopStringsMax + 1, "x")),
              StatusIs(kInvalid, HasSubstr("17")));
  EXPECT_OK(check({std::string(limits::kStopStringBytesMax, 'x')}));
  EXPECT_THAT(check({std::string(limits::kStopStringBytesMax + 1, 'x')}), HasCode(kInvalid));
  EXPECT_THAT(check({"ok", ""}), StatusIs(kInvalid, HasSubstr("stop[1]")));
  EXPECT_THAT(check({"\xc3"}), StatusIs(kInvalid, HasSubstr("UTF-8")));
}

TEST(GenerationLimitsTest, StopTokensAreCounted) {
  v1::GenerateRequest request = Valid();
  for (int i = 0; i < limits::kStopTokensMax; ++i) {
    request.mutable_sampling()->add_stop_token_ids(i);
  }
  EXPECT_OK(ValidateRequest(request));
  request.mutable_sampling()->add_stop_token_ids(1);
  EXPECT_THAT(ValidateRequest(request), HasCode(kInvalid));
}

TEST(GenerationLimitsTest, Prompt) {
  v1::GenerateRequest request = Valid();
  request.set_prompt(std::string(limits::kPromptBytesMax, 'x'));
  EXPECT_OK(ValidateRequest(request));
  request.set_prompt(std::string(limits::kPromptBytesMax + 1, 'x'));
  EXPECT_THAT(ValidateRequest(request), StatusIs(kInvalid, HasSubstr("prompt")));
  request.set_prompt("half a character: \xe2\x82");
  EXPECT_THAT(ValidateRequest(request), StatusIs(kInvalid, HasSubstr("UTF-8")));
  request.clear_input();
  EXPECT_THAT(ValidateRequest(request), StatusIs(kInvalid, HasSubstr("input")));
}

TEST(GenerationLimitsTest, TokenIds) {
  v1::GenerateRequest request = Valid();
  request.mutable_token_ids();
  EXPECT_THAT(ValidateRequest(request), HasCode(kInvalid));
  request.mutable_token_ids()->add_ids(0);
  request.mutable_token_ids()->add_ids(limits::kVocabMax - 1);
  EXPECT_OK(ValidateRequest(request));
  request.mutable_token_ids()->add_ids(-1);
  EXPECT_THAT(ValidateRequest(request), StatusIs(kInvalid, HasSubstr("token_ids[2]")));
}

TEST(GenerationLimitsTest, ModelAndRequestId) {
  v1::GenerateRequest request = Valid();
  for (const char* model : {"tiny", "models/tiny", "models/0.a_b-c"}) {
    request.set_model(model);
    EXPECT_OK(ValidateRequest(request)) << model;
  }
  for (const char* model :
       {"", "models/", "Tiny", "../x", "a..b", "a/b", "models/models/x", "-a", "\xff"}) {
    request.set_model(model);
    EXPECT_THAT(ValidateRequest(request), StatusIs(kInvalid, HasSubstr("model"))) << model;
  }
  request = Valid();
  request.set_request_id(std::string(limits::kRequestIdBytesMax, 'r'));
  EXPECT_OK(ValidateRequest(request));
  for (const std::string& id : {std::string(limits::kRequestIdBytesMax + 1, 'r'),
                                std::string("a\nb"), std::string("\xff"), std::string("\x7f")}) {
    request.set_request_id(id);
    EXPECT_THAT(ValidateRequest(request), StatusIs(kInvalid, HasSubstr("request_id")));
  }
}

TEST(GenerationLimitsTest, Chat) {
  v1::ChatRequest request;
  request.set_model("tiny");
  EXPECT_THAT(ValidateRequest(request), StatusIs(kInvalid, HasSubstr("messages")));
  v1::ChatMessage* message = request.add_messages();
  message->set_role("user");
  message->set_content(std::string(limits::kPromptBytesMax, 'x'));
  EXPECT_OK(ValidateRequest(request));
  message = request.add_messages();
  message->set_role("assistant");
  EXPECT_OK(ValidateRequest(request));
  message->set_content("y");
  EXPECT_THAT(ValidateRequest(request), StatusIs(kInvalid, HasSubstr("messages")));
  message->set_content("\xff");
  EXPECT_THAT(ValidateRequest(request), StatusIs(kInvalid, HasSubstr("messages[1].content")));
  message->clear_content();
  message->set_role("");
  EXPECT_THAT(ValidateRequest(request), StatusIs(kInvalid, HasSubstr("messages[1].role")));
  message->set_role(std::string(limits::kChatRoleBytesMax + 1, 'r'));
  EXPECT_THAT(ValidateRequest(request), HasCode(kInvalid));
  message->set_role("user");
  while (request.messages_size() < limits::kChatMessagesMax) *request.add_messages() = *message;
  EXPECT_OK(ValidateRequest(request));
  *request.add_messages() = *message;
  EXPECT_THAT(ValidateRequest(request), StatusIs(kInvalid, HasSubstr("4097")));
  request.mutable_messages()->Clear();
  message = request.add_messages();
  message->set_role("user");
  request.mutable_sampling()->set_temperature(kNaN);
  EXPECT_THAT(ValidateRequest(request), HasCode(kInvalid));
}

TEST(GenerationLimitsTest, TokenizeAndDetokenize) {
  v1::TokenizeRequest tokenize;
  tokenize.set_model("tiny");
  EXPECT_THAT(ValidateRequest(tokenize), StatusIs(kInvalid, HasSubstr("input")));
  tokenize.set_text("");
  EXPECT_OK(ValidateRequest(tokenize));
  tokenize.set_text("\xff");
  EXPECT_THAT(ValidateRequest(tokenize), HasCode(kInvalid));
  tokenize.mutable_messages();
  EXPECT_THAT(ValidateRequest(tokenize), HasCode(kInvalid));
  v1::DetokenizeRequest detokenize;
  EXPECT_THAT(ValidateRequest(detokenize), StatusIs(kInvalid, HasSubstr("model")));
  detokenize.set_model("tiny");
  EXPECT_OK(ValidateRequest(detokenize));
  detokenize.add_token_ids(-1);
  EXPECT_THAT(ValidateRequest(detokenize), HasCode(kInvalid));
}

}  // namespace
}  // namespace walsh
